"""What every conformance check needs: cases (method x base model), bases, outputs, comparisons."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import tiny
from tunewise.core.adaptation import handles
from tunewise.core.errors import UserError
from tunewise.core.handle import Handle, attach
from tunewise.core.merge import mergeable
from tunewise.core.method import get_method, method_names
from tunewise.core.recipe import Recipe
from tunewise.head import GapHead

from . import third_party  # noqa: F401 - its method joins the catalog, as a user's own does

__all__ = ["BASES", "IMAGES", "Case", "close", "each", "fresh", "gap", "outputs", "perturb", "tokenizer_of"]
__all__ += ["close_as_rounded", "real_tokens", "refused", "remarks", "same"]

BASES = ("roberta", "llama")
IMAGES = "vit"
"""The base of methods that read images (`inputs="images"`), and of a few others besides: a random ViT."""
ALSO_IMAGES = ("bitfit", "lora", "lst", "prefix_tuning", "series_adapter", "vpt", "vqt")
remarks: dict[str, str] = {}
"""What the running check found out beside passing, as `conftest.py` writes it down: "refused", "inexact"."""
PADS = {"roberta": 1, "llama": 0}
AUTO = {
    "base": "AutoModel",
    "masked_lm": "AutoModelForMaskedLM",
    "causal_lm": "AutoModelForCausalLM",
    "sequence_classification": "AutoModelForSequenceClassification",
    "image_classification": "AutoModelForImageClassification",
}
PLAIN = {"roberta": "masked_lm", "llama": "causal_lm", IMAGES: "image_classification"}


@cache
def _base(base: str, kind: str) -> nn.Module:
    """Roberta is the real antibody model (4 layers, width 128), Llama a random one (2 layers, width 32)."""
    import transformers

    from tunewise.assets import model_path
    from tunewise.assets.convert import quiet_transformers

    auto = getattr(transformers, AUTO[kind])
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(0)
        if base != "roberta":
            return tiny(base) if kind == PLAIN[base] else auto.from_config(tiny(base).config).eval()
        options = {"add_pooling_layer": False} if kind == "base" else {}
        model: nn.Module = auto.from_pretrained(model_path("tiny-roberta"), **options)
    return model.eval()


@cache
def tokenizer_of(base: str) -> Any:
    """The real model's own tokenizer; one of a few words for the random model, none for images."""
    if base == IMAGES:
        return None
    from transformers import AutoTokenizer

    from tests.task.tiny import tiny_tokenizer
    from tunewise.assets import model_path

    return tiny_tokenizer() if base == "llama" else AutoTokenizer.from_pretrained(model_path("tiny-roberta"))


def fresh(base: str, kind: str) -> nn.Module:
    """A copy of its own of a base model, in eval mode."""
    return copy.deepcopy(_base(base, kind))


@dataclass(frozen=True)
class Case:
    """One method on one base model. `change` edits the fresh base before anything is attached."""

    name: str
    recipe: Callable[[], Recipe]
    base: str = "roberta"
    lr: float = 1e-3
    change: Callable[[nn.Module], Any] | None = None

    @property
    def id(self) -> str:
        return f"{self.name}-{self.base}"

    @cached_property
    def parts(self) -> Recipe:
        """The recipe, to read properties from."""
        return self.recipe()

    @property
    def mergeable(self) -> bool:
        return all(mergeable(p) for p in self.parts["delta"])

    @property
    def declares_identity(self) -> bool:
        return all(p.identity for p in self.parts["delta"])  # type: ignore[attr-defined]

    def kind(self, recipe: Recipe) -> str:
        """Which model class the recipe's head reads; without a head the language model."""
        plain = PLAIN[self.base]
        head: Any = recipe.single("head")
        return plain if head is None else str(head.auto_for(_base(self.base, plain).config))

    def model(self) -> nn.Module:
        """A fresh base model without any adaptation."""
        model = fresh(self.base, self.kind(self.parts))
        if self.change is not None:
            self.change(model)
        return model

    def attach(
        self, model: nn.Module, *, seed: int = 1, moved: bool = True, name: str = "default", **options: Any
    ) -> Handle:
        """Attaches; with `moved`, tensors leave their start, so that zero factors hide nothing.

        A refusal in words skips the check (`test_methods.py` demands that some base model is accepted).
        """
        try:
            handle = self.attach_or_raise(model, seed=seed, name=name, **options)
        except UserError as error:
            pytest.skip(str(error))
        if moved:
            perturb(handle, seed)
        return handle

    def attach_or_raise(self, model: nn.Module, *, seed: int = 1, **options: Any) -> Handle:
        """Attaches with heads that have met a task of two classes."""
        recipe = self.recipe()
        task = SimpleNamespace(name="classification", labels=["a", "b"])
        for head in recipe["head"]:
            head.setup(task, tokenizer_of(self.base), model)  # type: ignore[attr-defined]
        return attach(model, recipe, seed=seed, **options)

    def adapted(self, seed: int = 1) -> tuple[nn.Module, Handle]:
        """A fresh base with the method attached and moved."""
        model = self.model()
        return model, self.attach(model, seed=seed)

    def batch(
        self, lengths: tuple[int, ...] = (9, 6), pad: str = "right", counted: bool = False
    ) -> dict[str, Tensor]:
        """Model inputs of random tokens; row i is the same text whatever the others and the padding are.

        For image models every row is an image. With `counted`, decoders get positions counted from the mask, as
        `generate` gives them.
        """
        if self.base == IMAGES:
            makers = [torch.Generator().manual_seed(i * 1000 + n) for i, n in enumerate(lengths)]
            return {"pixel_values": torch.stack([torch.randn(3, 16, 16, generator=m) for m in makers])}
        width, pad_id = max(lengths), PADS[self.base]
        ids = torch.full((len(lengths), width), pad_id)
        mask = torch.zeros(len(lengths), width, dtype=torch.long)
        for i, n in enumerate(lengths):
            text = torch.randint(4, 24, (n,), generator=torch.Generator().manual_seed(i * 1000 + n))
            where = slice(width - n, width) if pad == "left" else slice(n)
            if self.base == "roberta" and any(isinstance(h, GapHead) for h in self.parts["head"]):
                text[-1] = tokenizer_of(self.base).mask_token_id
            ids[i, where], mask[i, where] = text, 1
        found = {"input_ids": ids, "attention_mask": mask}
        if counted and self.base == "llama":
            found["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        return found


def each(*bases: str, when: Callable[[Case], bool] = lambda case: True) -> pytest.MarkDecorator:
    """Parametrises a test over the whole catalog and `bases` (default: all), where the property `when` holds.

    A new method joins by being there.
    """
    cases: list[Any] = []
    for name in method_names():
        found = get_method(name)
        also = (IMAGES,) if not bases and name in ALSO_IMAGES else ()
        only = (IMAGES,) if found.facts.get("inputs") == "images" else None
        for base in only or (*(bases or BASES), *also):
            case = Case(name, found, base, lr=found.lr[1] if found.lr else 1e-3)
            if when(case):
                cases.append(pytest.param(case, id=case.id))
    return pytest.mark.parametrize("case", cases)


def outputs(model: nn.Module, batch: dict[str, Tensor], grad: bool = False) -> Tensor:
    """The answer: logits of an adaptation's head if there is one, else the model's or its hidden states."""
    with torch.set_grad_enabled(grad):
        asks: dict[str, Any] = {}
        for handle in handles(model).values():
            for head in handle.recipe["head"]:
                asks |= head.asks
        found = model(**batch, **asks)
        for handle in handles(model).values():
            for _, _, t in handle.sites:
                if t.part.slot == "head" and (handle.active or handle.merged is not None):
                    view = SimpleNamespace(
                        inputs=batch, ids=[str(i) for i in range(len(next(iter(batch.values()))))]
                    )
                    return t.part.logits(t.cast(torch.float32), found, view)  # type: ignore[no-any-return]
        return _of_model(found)


@torch.no_grad()
def model_outputs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """What the model itself answers, whatever a head reads out of that: other libraries' files hold this much."""
    return _of_model(model(**batch))


def _of_model(found: Any) -> Tensor:
    return found.logits if "logits" in found else found.last_hidden_state  # type: ignore[no-any-return]


@torch.no_grad()
def perturb(handle: Handle, seed: int, size: float = 0.03) -> None:
    """Every trainable tensor moves by seeded noise."""
    make = torch.Generator().manual_seed(seed)
    for p in handle.parameters():
        p.add_(torch.randn(p.shape, generator=make).to(p.dtype) * size)


def gap(found: Tensor, wanted: Tensor) -> float:
    """max |found - wanted| / max |wanted|; NaN counts as infinitely far."""
    assert found.shape == wanted.shape, f"shapes {tuple(found.shape)} and {tuple(wanted.shape)}"
    found, wanted = found.detach(), wanted.detach()
    value = float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max().clamp(min=1e-12))
    return float("inf") if value != value else value


def close(found: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    """Fails when two tensors are further apart than `tolerance`, relative to the largest value."""
    far = gap(found, wanted)
    assert far <= tolerance, f"{what}: relative difference {far:.1e}, allowed {tolerance:.0e}"


def close_as_rounded(
    found: Tensor, wanted: Tensor, model: nn.Module, batch: dict[str, Tensor], what: str
) -> None:
    """`close` to 1e-5, or to four times as far as the plain `model` itself is from its answer in float64."""
    far = gap(found, wanted)
    if far > 1e-5:
        exact = outputs(copy.deepcopy(model).double(), batch)
        far_itself = gap(outputs(model, batch).double(), exact)
        close(found, wanted, 4 * far_itself, f"{what} (rounding alone moves it by {far_itself:.1e})")


def same(found: Tensor, wanted: Tensor, what: str) -> None:
    """Fails when two tensors are not bit-equal."""
    assert torch.equal(found, wanted), f"{what}: not bit-equal, relative difference {gap(found, wanted):.1e}"


def real_tokens(values: Tensor, batch: dict[str, Tensor], row: int) -> Tensor:
    """The answer for one row without what stands at padding."""
    if values.dim() == 3 and "input_ids" in batch and values.shape[1] == batch["input_ids"].shape[1]:
        return values[row][batch["attention_mask"][row].bool()]
    return values[row]


@contextmanager
def refused(what: str, words: Iterable[str] = (), whole: bool = True) -> Any:
    """The block must raise `UserError`, one sentence that holds all of `words`.

    whole   the check has no more to try: what it is about cannot be done with this method
    """
    try:
        yield
    except UserError as error:
        for word in words:
            assert word in str(error), f"{what}: the refusal does not say {word!r}: {error}"
        if whole:
            remarks["refused"] = str(error)
        return
    raise AssertionError(f"{what}: was not refused")
