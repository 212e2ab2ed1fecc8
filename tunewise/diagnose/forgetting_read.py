"""How a backbone is read for forgetting: texts as batches, last hidden states, and a language model's output layer
apart from its body.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunewise.core.errors import UserError
from tunewise.diagnose.inference import evaluating
from tunewise.head import pool
from tunewise.task.text import pad_rows, tokenize

__all__ = [
    "MAKERS",
    "Batch",
    "following",
    "hidden_states",
    "log_probabilities",
    "own_words",
    "trained_for",
    "twin",
]

BATCH = 32
MASKED, SEED = 0.15, 0
# What stands in a model's own dictionary and belongs to its adaptations or to accelerate.
FOREIGN = ("forward", "_old_forward", "_hf_hook", "tw_adaptations", "tw_attention")
Rows = list[tuple[dict[str, Any], list[int], list[int]]]


@dataclass
class Batch:
    """Rows for one forward pass: `at` are the flat positions that are read and `targets` the words that belong
    there; pairs have neither, and `rows` says where their pooled states go.
    """

    inputs: dict[str, Tensor]
    rows: Tensor
    at: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        inputs = {name: value.to(device) for name, value in self.inputs.items()}
        return Batch(inputs, self.rows.to(device), self.at.to(device), self.targets.to(device))


def _next_tokens(texts: Sequence[str], tokenizer: Any, limit: int) -> list[Batch]:
    rows = []
    for example in _encoded(texts, tokenizer, limit):
        ids = example["input_ids"]
        rows.append((example, list(range(len(ids) - 1)), ids[1:]))
    return _batches([row for row in rows if row[1]], tokenizer)


def _masked_tokens(texts: Sequence[str], tokenizer: Any, limit: int) -> list[Batch]:
    make, special = torch.Generator().manual_seed(SEED), set(tokenizer.all_special_ids)
    rows = []
    for example in _encoded(texts, tokenizer, limit):
        ids = example["input_ids"]
        free = [i for i, token in enumerate(ids) if token not in special]
        order = torch.randperm(len(free), generator=make).tolist()
        at = sorted(free[i] for i in order[: max(1, round(MASKED * len(free)))])
        masked = [tokenizer.mask_token_id if i in at else token for i, token in enumerate(ids)]
        rows.append(({**example, "input_ids": masked}, at, [ids[i] for i in at]))
    return _batches([row for row in rows if row[1]], tokenizer)


def _pairs(texts: Sequence[str], tokenizer: Any, limit: int) -> list[Batch]:
    """All first halves, then all second ones, cut at a space near the middle where there is one."""
    halves: tuple[list[str], list[str]] = ([], [])
    for text in texts:
        cut = text.find(" ", len(text) // 2)
        cut = cut if cut > 0 else len(text) // 2
        halves[0].append(text[:cut])
        halves[1].append(text[cut:].strip())
    return _batches([(e, [], []) for e in _encoded([*halves[0], *halves[1]], tokenizer, limit)], tokenizer)


MAKERS: dict[str, Callable[[Sequence[str], Any, int], list[Batch]]] = {
    "next token": _next_tokens,
    "masked token": _masked_tokens,
    "pairs": _pairs,
}


def _encoded(texts: Sequence[str], tokenizer: Any, limit: int) -> list[dict[str, Any]]:
    return tokenize([(text,) for text in texts], tokenizer, limit)[0]


def _batches(rows: Rows, tokenizer: Any) -> list[Batch]:
    """Batches of like lengths from (example, places, words there), padded behind, where no decoder sees it."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]["input_ids"]))
    made = []
    for start in range(0, len(order), BATCH):
        mine = order[start : start + BATCH]
        inputs = pad_rows([rows[i][0] for i in mine], tokenizer, "right")
        width = inputs["input_ids"].shape[1]
        at = [n * width + place for n, i in enumerate(mine) for place in rows[i][1]]
        words = [word for i in mine for word in rows[i][2]]
        integers = [torch.tensor(values, dtype=torch.long) for values in (mine, at, words)]
        made.append(Batch(inputs, *integers))
    return made


def hidden_states(model: Any, batches: Sequence[Batch]) -> Tensor:
    """Last hidden states `[places, width]`, or mean-pooled ones `[rows, width]` of pairs, in the order of rows.

    They are caught where the body hands them to whatever head the model was loaded with, so that prompts in
    front, side networks and prefixes are in them; what stands in front of the text is cut off.
    """
    body, found, caught = model.base_model, list[Tensor](), list[Any]()
    takes = inspect.signature(model.forward).parameters
    # No cache, and logits of one place only, since those of the head are not looked at.
    options = {n: v for n, v in (("use_cache", False), ("logits_to_keep", 1)) if n in takes}
    # OPT's language model calls the decoder inside its body.
    places = [m for m in (body, getattr(body, "decoder", None)) if isinstance(m, nn.Module)]
    hooks = [m.register_forward_hook(lambda module, args, out: caught.append(out)) for m in places]
    try:
        with evaluating(model):
            for batch in batches:
                caught.clear()
                model(**batch.inputs, **options)
                out, mask = caught[-1], batch.inputs["attention_mask"].bool()
                hidden = getattr(out, "last_hidden_state", None)
                hidden = (out[0] if hidden is None else hidden)[:, -mask.shape[1] :]
                pooled = pool(hidden.float(), mask, "mean") if not len(batch.at) else None
                found.append(hidden.flatten(0, 1)[batch.at] if pooled is None else pooled)
    finally:
        for hook in hooks:
            hook.remove()
    states = torch.cat(found)
    if len(batches[0].at):
        return states
    return torch.empty_like(states).index_copy_(0, torch.cat([b.rows for b in batches]), states)


def trained_for(model: Any, name: str | None) -> tuple[str, nn.Module | None, tuple[str, ...]]:
    """(which of `MAKERS`, the output layer over words, what of it is the word embeddings); "" if the base has one
    that is not there.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    config, masked = model.config, _is_masked(model.config)
    kind = "masked token" if masked else "next token"
    own = own_words(model)
    if own is not None:
        return kind, own, ()
    if masked:
        lm = _fetched(name, next(model.parameters()).device)
    elif type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    else:
        lm = None
    if lm is None:
        return "pairs", None, ()
    words, table = _bodiless(lm), lm.get_input_embeddings().weight
    outside = [(n, m) for n, m in words.named_modules() if n.split(".")[0] != lm.base_model_prefix]
    tied = tuple(n for n, m in outside if m._parameters.get("weight") is table)
    words = following(words, model, tied)
    return ("", None, ()) if any(p.is_meta for p in words.parameters()) else (kind, words, tied)


def _is_masked(config: Any) -> bool:
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    named = " ".join(getattr(config, "architectures", None) or ())
    decodes = getattr(config, "is_decoder", False) or "CausalLM" in named or "LMHead" in named
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and not decodes


def _fetched(name: str | None, device: torch.device) -> Any:
    """The masked language model of a checkpoint, or None for one that has no such output layer."""
    from tunewise.backbone import backbone_config, load

    if name is None:
        return None
    named = getattr(backbone_config(name), "architectures", None) or ["ForMaskedLM"]
    if not any(n.endswith(("ForMaskedLM", "ForPreTraining")) for n in named):
        return None
    with torch.random.fork_rng(devices=[]):
        try:
            return load(name, auto="masked_lm", device=device)[0]
        except UserError:  # the base itself was loaded from there: only the output layer can be missing
            return None


class _States:
    """A body's outputs of which only the last hidden states are known."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, item: int | slice) -> Any:
        return (self.last_hidden_state,)[item]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class _Given(nn.Module):
    """Stands in for a body: gives the states that were put into it. Some output layers read the embeddings."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.embeddings, self.hidden = getattr(body, "embeddings", None), torch.empty(0)

    @property
    def decoder(self) -> _Given:
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _States(self.hidden)


def own_words(model: Any) -> nn.Module | None:
    """The output layer over words that the model was loaded with: the model without its body, tensors shared."""
    there = getattr(model, "get_output_embeddings", lambda: None)() is not None
    return _bodiless(model) if there and model.base_model is not model else None


def _bodiless(lm: Any) -> Any:
    shell: Any = object.__new__(type(lm))
    shell.__dict__.update({k: v for k, v in lm.__dict__.items() if k not in FOREIGN})
    shell._modules = {n: m for n, m in lm._modules.items() if not n.startswith("tw_")}
    shell._modules[lm.base_model_prefix] = _Given(lm.base_model)
    shell._forward_hooks, shell._forward_pre_hooks = OrderedDict(), OrderedDict()
    return shell


def following(words: nn.Module, model: Any, tied: Sequence[str]) -> nn.Module:
    """The output layer as it is on this model: with its word embeddings where the two are tied."""
    made: Any = twin(words)
    made._modules[made.base_model_prefix] = _Given(model.base_model)
    for name in tied:
        made.get_submodule(name)._parameters["weight"] = model.get_input_embeddings().weight
    return made


def twin(words: nn.Module) -> nn.Module:
    """The same layer in other modules with the same tensors: what is swapped in a model does not reach it."""
    return copy.deepcopy(words, {id(t): t for t in (*words.parameters(), *words.buffers())})


def log_probabilities(words: Any, hidden: Tensor) -> Tensor:
    """log p of every word, `[n, words]` in float32, after the states `[n, width]`."""
    given = words._modules[words.base_model_prefix]
    given.hidden = hidden[None]
    ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
    with evaluating(words):
        logits = words(input_ids=ids).logits[0]
    given.hidden = hidden[:0]
    return F.log_softmax(logits.float(), -1)
