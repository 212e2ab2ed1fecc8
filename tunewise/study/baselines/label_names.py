"""Names of labels as answers of an encoder: in the gap of a cloze, or as the nearest description."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import normalize

from tunewise.core.errors import UserError
from tunewise.head import ClozeHead, pool
from tunewise.study.baselines.passes import Passes

__all__ = ["encoder_passes", "why_no_names"]

Row = dict[str, Any]

DESCRIPTION = "This text is {}."


def why_no_names(task: Any, tokenizer: Any, *, worked: bool, masked: bool) -> str | None:
    """Why the names of the labels say nothing to the model, in words; None if they may.

    worked  whether worked examples show what a name stands for
    masked  whether one token must hold the name, in the gap of a masked language model
    """
    labels = [str(label) for label in task.labels]
    quoted = ", ".join(f'"{label}"' for label in labels[:4]) + (", ..." if len(labels) > 4 else "")
    if not worked and all(label.lstrip("+-").replace(".", "", 1).isdecimal() for label in labels):
        return f"the label names ({quoted}) are numbers, which do not say what they stand for"
    empty = DESCRIPTION.format("")
    # A tokenizer of sequences has a token for each letter, and none for some letters.
    spelt = len(tokenizer(empty, add_special_tokens=False)["input_ids"]) > sum(map(str.isalnum, empty)) / 2
    described = tokenizer([DESCRIPTION.format(label) for label in labels], add_special_tokens=False)[
        "input_ids"
    ]
    if spelt or any(tokenizer.unk_token_id in ids for ids in described):
        return f"the label names ({quoted}) are no words to the tokenizer of the base model"
    if masked and tokenizer.mask_token is None:
        return "the tokenizer of the base model has no token for a gap"
    if masked:
        try:
            _cloze(task, tokenizer, SimpleNamespace(get_output_embeddings=lambda: True))
        except UserError:
            return f"the label names ({quoted}) are not one token each of the base model's tokenizer"
    return None


def _cloze(task: Any, tokenizer: Any, model: Any) -> Any:
    """The head that answers with label names, at the step before the first."""
    head = ClozeHead()
    head.setup(task, tokenizer, model)
    return head


def encoder_passes(
    task: Any, model: nn.Module, tokenizer: Any, rows: Sequence[Row], masked: bool, size: int
) -> tuple[Passes, str]:
    """(passes that give label names, how in words): the name in the gap of a cloze for masked language models, for
    others argmax_c cos(h(text), h("This text is c.")), h the mean of the last hidden states.
    """
    head: Any = _cloze(task, tokenizer, model) if masked else None
    examples = task.encode(rows, tokenizer, head, labelled=False)
    device = next(model.parameters()).device

    inner: Any = getattr(model, "base_model", model)  # a model that was loaded with another head serves too

    def embedded(chosen: Sequence[Row]) -> Tensor:
        """Mean last hidden state of length 1, `[rows, hidden]`."""
        batch = task.collate(chosen, tokenizer, "right").to(device)
        found, mask = inner(**batch.inputs), batch.inputs["attention_mask"].bool()
        return normalize(pool(found.last_hidden_state.float(), mask, "mean"), dim=1)

    if masked:
        how = f'The label name that the model puts into the gap of "{head.template}".'
    else:
        ids = tokenizer([DESCRIPTION.format(label) for label in task.labels])["input_ids"]
        labels = embedded([{"id": "", "input_ids": i, "labels": None} for i in ids])
        how = f'The label whose "{DESCRIPTION.format("LABEL")}" is nearest by mean hidden state.'

    def answer(numbers: Sequence[int]) -> list[str]:
        chosen = [examples[i] for i in numbers]
        if not masked:
            return [task.labels[i] for i in (embedded(chosen) @ labels.T).argmax(1).tolist()]
        batch = task.collate(chosen, tokenizer, "right").to(device)
        said: list[str] = task.predict(head.logits(None, model(**batch.inputs), batch), batch)
        return said

    return Passes([e["length"] for e in examples], size, answer), how
