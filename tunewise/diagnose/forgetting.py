"""What a backbone has lost by being adapted: its own pretraining loss, and its distance from the frozen base, on
general text.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunewise.core.adaptation import handles
from tunewise.core.errors import UserError
from tunewise.core.handle import Handle
from tunewise.diagnose.forgetting_read import (
    MAKERS,
    Batch,
    following,
    hidden_states,
    log_probabilities,
    own_words,
    trained_for,
    twin,
)

__all__ = ["General", "base_side", "contrast", "general_texts"]

ROWS, LENGTH = 256, 128
TEMPERATURE = 0.05
# Texts in a tokenizer's own language have next to none; tiny-roberta, which knows proteins, has 0.16 in English.
UNKNOWN = 0.05
# Numbers in one chunk of logits: 32 MB in float32.
CHUNK = 2**23
NEWS, REVIEWS = "reviews/nyt", "reviews/amazon"


@dataclass
class General:
    """mean KL(p || q) and mean -log q + log p on general text, p of the frozen base, q of a tuned model, in nats.

    kind      "next token", "masked token", "pairs" (see `base_side`), or "" where nothing can be measured
    loss      mean -log p of the base; None where nothing can be measured
    reason    why nothing can be measured, as a sentence
    data      where the texts are from
    Of the base it keeps the last hidden states at the places that are read, from which its own output layer,
    whose tensors are shared, makes p again: a hundredth of the memory of p itself.
    """

    kind: str = ""
    loss: float | None = None
    reason: str = ""
    data: str = ""
    batches: list[Batch] = field(default_factory=list, repr=False)
    hidden: Tensor | None = field(default=None, repr=False)
    words: nn.Module | None = field(default=None, repr=False)
    tied: tuple[str, ...] = ()

    @torch.no_grad()
    def measure(self, handle: Handle) -> dict[str, float]:
        """{"forgetting": loss(tuned) - loss(base), "forgetting_kl": mean KL(base || tuned), "general_loss":
        loss(base)}; {} where nothing can be measured.

        Means over all tokens that are read, or over pairs. The handle's model may be another copy of the base
        and loaded with another head; it is left as it was. Raises `UserError` for a handle that is switched
        off or merged, and where the base's output layer was trained in place.
        """
        if self.loss is None or self.hidden is None:
            return {}
        if not handle.active:
            raise UserError(
                f'The adaptation "{handle.name}" is merged or switched off: forgetting is measured while it is on.'
            )
        model: Any = handle.model
        tuned = hidden_states(model, self.batches)
        if self.words is None:
            targets = torch.arange(len(tuned) // 2, device=tuned.device)
            loss, kl = _compare(contrast(self.hidden), contrast(tuned), targets)
        else:
            self._base_is_known(handle)
            words = own_words(model) or following(self.words, model, self.tied)
            loss, kl = self._over_words(self.words, words, tuned)
        return {"forgetting": loss - self.loss, "forgetting_kl": kl, "general_loss": self.loss}

    def _over_words(self, old: nn.Module, new: nn.Module, tuned: Tensor) -> tuple[float, float]:
        """Loss and KL in chunks of places, so that no logits of all of them are alive at once."""
        assert self.hidden is not None
        targets = torch.cat([batch.targets for batch in self.batches])
        config: Any = old.config
        size = max(1, CHUNK // config.get_text_config().vocab_size)
        loss = kl = 0.0
        for start in range(0, len(targets), size):
            here = slice(start, start + size)
            p = log_probabilities(old, self.hidden[here])
            q = p if new is old else log_probabilities(new, tuned[here])
            parts = _compare(p, q, targets[here])
            loss, kl = loss + parts[0] * len(p), kl + parts[1] * len(p)
        return loss / len(targets), kl / len(targets)

    def _base_is_known(self, handle: Handle) -> None:
        assert self.words is not None
        written = {id(weight) for weight, _ in handle.committed.values()}
        if not handle.undo:
            written |= {id(e.ours) for e in handle.existing.values()}
        if any(id(p) in written for p in self.words.parameters()):
            raise UserError(
                "The base's output layer was trained in place, so forgetting cannot be measured; attach with "
                "undo=True."
            )


@torch.no_grad()
def base_side(
    model: Any,
    tokenizer: Any,
    *,
    name: str | None = None,
    study: str = "",
    general: Any = None,
    rows: int = ROWS,
) -> General:
    """The frozen base on general text, computed once: `reference.measure(handle)` then serves every adaptation.

    model    the base, loaded with any head; adaptations on it are switched off meanwhile
    name     where it was loaded from: a masked language model's output layer is fetched from there, once
    study    name of the study's own data, which are not general; `general` any data with a column of text
    What is measured depends on what the base was trained to do:
    next token    decoders. One that is loaded without its output layer gets its word embeddings as such, if
                  the two are tied; else nothing is measured.
    masked token  encoders whose checkpoint has the output layer. 15 % of each text's tokens, at least one and
                  always the same, become the mask token.
    pairs         other encoders, such as sentence encoders, which have no distribution over words. It stands
                  in for their contrastive pretraining: which of all second halves belongs to a first half?
                  q_ij = softmax_j(cos(a_i, b_j) / 0.05) over mean-pooled states, loss -log q_ii (InfoNCE).
    At most `rows` texts, chosen by a hash of their content, of at most 128 tokens. Nothing is measured, and
    `reason` says why, for models that read no text or cannot read these; `UserError` for data without text.
    """
    reason = _cannot(model, tokenizer)
    if reason:
        return General(reason=f"Forgetting is not measured: {reason}.")
    texts, source = general_texts(general, study=study, rows=rows)
    share = _unknown(texts, tokenizer)
    if share > UNKNOWN:
        reason = (
            f"the tokenizer does not know {share:.0%} of {source}; give texts that it knows with --general"
        )
        return General(reason=f"Forgetting is not measured: {reason}.", data=source)
    with ExitStack() as stack:
        for handle in [h for h in handles(model).values() if h.active]:
            stack.enter_context(handle.disabled())
        kind, words, tied = trained_for(model, name)
        if not kind or (kind == "masked token" and tokenizer.mask_token_id is None):
            reason = (
                "the tokenizer has no mask token" if kind else "the model was loaded without its output layer"
            )
            return General(reason=f"Forgetting is not measured: {reason}.", data=source)
        limit = min(LENGTH, tokenizer.model_max_length, _positions(model) // 2)
        batches = [b.to(next(model.parameters()).device) for b in MAKERS[kind](texts, tokenizer, limit)]
        if not batches:
            raise UserError(f"No text of {source} is long enough to measure forgetting with.")
        hidden = hidden_states(model, batches)
        found = General(kind, None, "", source, batches, hidden, None if words is None else twin(words), tied)
    if found.words is None:
        p = contrast(hidden)
        found.loss = _compare(p, p, torch.arange(len(p), device=p.device))[0]
    else:
        found.loss = found._over_words(found.words, found.words, hidden)[0]
    return found


def general_texts(general: Any = None, *, study: str = "", rows: int = ROWS) -> tuple[list[str], str]:
    """(at most `rows` distinct texts in the order of a hash of their rows, the name of the data).

    Without `general`, sentences of newspaper editorials, or of product reviews if the study is about the
    former. The text is the column "text", or the one with the longest strings; `UserError` without any.
    """
    from tunewise.data import read_rows

    default = REVIEWS if study.removeprefix("demo:") == NEWS else NEWS
    found = read_rows(f"demo:{default}" if general is None else general)
    columns = [name for name in found.columns if name != "source_id"]
    lengths = {n: sum(len(r[n]) for r in found.rows if isinstance(r.get(n), str)) for n in columns}
    if not any(lengths.values()):
        raise UserError(f"{found.name} has no column of text to measure forgetting with.")
    column = "text" if lengths.get("text") else max(lengths, key=lambda n: lengths[n])
    ordered = sorted(found.rows, key=lambda row: str(row["id"]))
    texts = [row[column].strip() for row in ordered if isinstance(row.get(column), str)]
    return [text for text in dict.fromkeys(texts) if len(text) > 1][:rows], found.name


def contrast(pooled: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """log softmax_j(cos(a_i, b_j) / temperature), `[rows, rows]`, of states `[2 rows, width]`: all a, then all b."""
    first, second = F.normalize(pooled.float(), dim=-1).chunk(2)
    return F.log_softmax(first @ second.T / temperature, -1)


def _compare(old: Tensor, new: Tensor, targets: Tensor) -> tuple[float, float]:
    """(mean -log new at the targets, mean KL(old || new)) of log-probabilities `[n, choices]`."""
    return float(F.nll_loss(new, targets)), float((old.exp() * (old - new)).sum(-1).mean())


def _cannot(model: Any, tokenizer: Any) -> str:
    config = getattr(model, "config", None)
    if not hasattr(model, "base_model") or config is None:
        return f"{type(model).__name__} is no model of transformers"
    if getattr(model, "main_input_name", "") != "input_ids" or not hasattr(tokenizer, "unk_token_id"):
        return f"{type(model).__name__} reads no text"
    return f"{type(model).__name__} is an encoder-decoder" if config.is_encoder_decoder else ""


def _unknown(texts: Sequence[str], tokenizer: Any) -> float:
    rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    ids = [i for row in rows for i in row]
    return sum(i == tokenizer.unk_token_id for i in ids) / max(len(ids), 1)


def _positions(model: Any) -> int:
    count = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return count if isinstance(count, int) and count > 1 else 2 * LENGTH
