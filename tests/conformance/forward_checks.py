"""Checks of the forward and backward pass: start, gradients, counts, calls, linearity, precision, padding."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tunewise.core.adaptation import handles
from tunewise.core.delta import Delta, forms
from tunewise.core.handle import Handle
from tunewise.head import Copilot
from tunewise.sites import Site, count_calls, find_sites, with_widths

from .support import IMAGES, Case, close, gap, outputs, real_tokens, remarks

__all__ = [
    "check_bfloat16",
    "check_calls",
    "check_checkpointing",
    "check_compiles",
    "check_count",
    "check_gradients",
    "check_identity",
    "check_linear",
    "check_padding",
]


def loss_of(answer: Tensor) -> Tensor:
    """A sum with fixed random signs, so that no symmetry makes a gradient vanish."""
    make = torch.Generator().manual_seed(7)
    return (answer.float() * torch.randn(answer.shape, generator=make)).sum()


def check_identity(case: Case) -> None:
    """Step 0 computes what the plain base computes, when every delta says so."""
    model, batch = case.model(), case.batch()
    wanted = model(**batch)
    case.attach(model, moved=False)
    found = model(**batch)
    for key in ("logits", "last_hidden_state"):
        if key in wanted:
            close(found[key], wanted[key], 1e-6, "step 0 is not the base model")


def check_gradients(case: Case) -> None:
    """The declared tensors, and no others, ask for a gradient, and each of them gets one that is not zero."""
    model, handle = case.adapted()
    declared = {id(p): n for n, p in ((n, i.tensor) for n, i in handle.tensors().items())}
    asking = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
    assert set(asking) == set(declared), (
        f"declared only: {[n for i, n in declared.items() if i not in asking][:3]}, "
        f"trainable but not declared: {[n for i, n in asking.items() if i not in declared][:3]}"
    )
    loss_of(outputs(model, case.batch(), grad=True)).backward()
    stray = [n for n, p in model.named_parameters() if p.grad is not None and id(p) not in declared]
    assert not stray, f"tensors of the frozen base got a gradient: {stray[:3]}"
    for name, info in handle.tensors().items():
        grad = info.tensor.grad
        assert grad is not None, f"{name} got no gradient"
        assert torch.isfinite(grad).all(), f"{name} got a gradient that is not finite"
        assert bool(grad.any()), f"{name} got a gradient of zeros"


def _tap_sites(handle: Handle, names: list[str]) -> list[Site]:
    everything = find_sites(handle.model)
    by_name = {s.name: s for s in reversed(with_widths(everything, everything))}
    return [by_name[n] for n in names]


def check_count(case: Case) -> None:
    """Trainable scalars = the written formula of every delta and site + trained parameters of the base."""
    plain, (_, handle) = case.model(), case.adapted()
    expected = sum(p.numel() for t in handle.owned.values() for p in t.parameters())
    for _, site, t in handle.sites:
        own = any(trainable for _, _, trainable, _ in t.meta.values())
        if own:
            written = type(t.part).formula is not Delta.formula
            assert written, f"{type(t.part).__name__} has tensors and writes down no formula of its own"
        taps = _tap_sites(handle, t.buffer.sites) if t.buffer is not None and t.taps else []
        expected += t.part.formula(site, taps) if own else 0
    trained = {n for _, part in handle.deltas for n in part.existing(plain)}
    params = dict(plain.named_parameters())
    expected += sum(params[n].numel() for n in trained)
    assert handle.trainable == expected, (
        f"{handle.trainable:,} trainable scalars, the formula says {expected:,}"
    )


EQUATIONS = (("input",), ("weight", "output", "product"), ("around",), ("read",), ("switch",))


def check_calls(case: Case) -> None:
    """No dead site: in one forward each delta acts as often as the place that it sits on is called."""
    model, handle = case.adapted()
    batch, places = case.batch(), _places(handle)
    before = [t.calls for _, _, t in handle.sites]
    calls = count_calls(model, lambda: outputs(model, batch), places)
    for was, place, (_, site, t) in zip(before, places, handle.sites, strict=True):
        if t.part.slot == "head":  # reads what the model gives, after the pass
            continue
        often = sum(any(f in forms(t.part) for f in group) for group in EQUATIONS)
        wanted = calls.count[place.name] * often
        if often:
            where = f"{type(t.part).__name__} at {site.name or 'the model'}"
            assert wanted > 0, f"{where} is dead: its place is never called"
            assert t.calls - was == wanted, f"{where} acted {t.calls - was} times, its place {wanted} times"
    if handle.sites:
        handle.check_called()


def _places(handle: Handle) -> list[Any]:
    """Where each delta acts, under a name of its own, as sites that can be counted."""
    from tunewise.delta.attention import attending_module

    found = []
    for i, (_, site, t) in enumerate(handle.sites):
        module = site.exit if site.exit is not None else site.module
        if "switch" in forms(t.part) and t.part.slot == "delta" and site.kind == "attention":
            module = attending_module(site.module, site.name)
        found.append(Site(name=f"{i}", kind="block", role="block", module=module))
    return found


def check_linear(case: Case) -> None:
    """What says `linear = True` is affine in x, with inputs of ordinary size."""
    _, handle = case.adapted()
    for _, site, t in handle.sites:
        given = set(forms(t.part)) & {"input", "output"}
        if not getattr(t.part, "linear", False) or not given or site.in_features is None:
            continue
        rows = torch.randn(5, 2, site.in_features, generator=torch.Generator().manual_seed(3))
        shares = torch.tensor([-1.5, 0.3, 2.5, 0.7, -0.9]).view(5, 1)

        def respond(x: Tensor, site: Site = site) -> Tensor:
            with torch.no_grad():
                return site.module(x)  # type: ignore[no-any-return]

        x, z = rows[:, 0], rows[:, 1]
        mixed = shares * respond(x) + (1 - shares) * respond(z)
        what = f"{type(t.part).__name__} at {site.name} says linear=True and is not affine"
        close(respond(shares * x + (1 - shares) * z), mixed, 1e-4, what)


def _as_said(case: Case) -> Callable[[Tensor], Tensor]:
    """Answers to compare: log p~ of a Copilot is arbitrarily steep where p + f falls to its floor, p~ is not."""
    corrected = any(isinstance(p, Copilot) for p in case.parts["head"])
    return (lambda answer: answer.softmax(-1)) if corrected else lambda answer: answer


def check_bfloat16(case: Case) -> None:
    """`model.bfloat16()` casts the backbone, not the deltas; answers stay as close as the plain base's do."""
    batch = case.batch()
    plain, (model, handle) = case.model(), case.adapted()
    wanted, plain_wanted = outputs(model, batch), outputs(plain, batch)
    model.bfloat16()
    for name, info in handle.tensors().items():
        if name not in handle.existing:
            assert info.tensor.dtype == handle.dtype, f"{name} was cast to {info.tensor.dtype}"
    base_error = gap(outputs(plain.bfloat16(), batch), plain_wanted)
    answer = outputs(model, batch, grad=True)
    view = _as_said(case)
    close(view(answer), view(wanted), 4 * base_error + 0.02, "bfloat16 is far from float32")
    loss_of(answer).backward()
    for name, info in handle.tensors().items():
        assert info.tensor.grad is not None, f"{name} got no gradient in bfloat16"
        assert torch.isfinite(info.tensor.grad).all(), f"{name} got a gradient that is not finite in bfloat16"
    handle.detach()
    left = [n for n, p in model.named_parameters() if p.dtype != torch.bfloat16]
    assert not left, f"detach left the bfloat16 model in two precisions: {left[:3]}"


def _padding_gaps(case: Case, adapted: bool) -> dict[str, float]:
    model = case.adapted()[0] if adapted else case.model()
    lengths, found = (9, 5), {}
    if case.base == IMAGES:  # nothing is padded, but rows must not change each other
        batch = case.batch(lengths)
        alone = outputs(model, {k: v[1:] for k, v in batch.items()})[0]
        return {"no side": gap(outputs(model, batch)[1], alone)}
    alone = outputs(model, {k: v[1:, :5] for k, v in case.batch(lengths, counted=True).items()})[0]
    for side in ("right", "left"):
        batch = case.batch(lengths, pad=side, counted=True)
        found[side] = gap(real_tokens(outputs(model, batch), batch, 1), alone)
    return found


def check_padding(case: Case) -> None:
    """A row answers the same alone, padded right and padded left, as far as the plain base itself does."""
    base, adapted = _padding_gaps(case, adapted=False), _padding_gaps(case, adapted=True)
    for side, far in adapted.items():
        allowed = max(1e-4, 10 * base[side])
        assert far <= allowed, (
            f"padding on the {side} moves the answer by {far:.1e}, the base's {base[side]:.1e}"
        )


def _training_gradients(case: Case, checkpointing: bool) -> tuple[Tensor, dict[str, Tensor]]:
    model, handle = case.adapted()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    model.train()
    handle.frozen_eval()
    torch.manual_seed(5)
    answer = outputs(model, case.batch(), grad=True)
    loss_of(answer).backward()
    found = {n: i.tensor.grad for n, i in handle.tensors().items()}
    return answer.detach(), {n: g for n, g in found.items() if g is not None}


def check_checkpointing(case: Case) -> None:
    """Gradient checkpointing gives the gradients of the plain pass, dropout included."""
    (answer, eager), (again, saving) = (_training_gradients(case, c) for c in (False, True))
    close(again, answer, 1e-6, "the answer under gradient checkpointing")
    assert eager.keys() == saving.keys(), f"without a gradient: {sorted(eager.keys() ^ saving.keys())[:3]}"
    _close_gradients(saving, eager, "under gradient checkpointing")


def _close_gradients(
    found: dict[str, Tensor], wanted: dict[str, Tensor], what: str, rounding: float = 1e-4
) -> None:
    largest = max(float(g.abs().max()) for g in wanted.values())
    for name, grad in wanted.items():
        far = float((found[name] - grad).abs().max())
        # a key bias has no true gradient: its rounding errors are measured against the others
        allowed = rounding * float(grad.abs().max()) + 1e-6 * largest
        assert far <= allowed, f"the gradient of {name} {what} is {far:.1e} off"


def _compiled_answer(model: nn.Module, batch: dict[str, Tensor], whole: bool = True) -> Tensor:
    twin = copy.copy(model)  # the same modules, compiled
    twin.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=whole)  # type: ignore[method-assign]
    assert handles(twin) is handles(model)
    try:
        return outputs(twin, batch, grad=True)
    except torch._dynamo.exc.Unsupported as error:
        if not whole or "logging.Logger" not in str(error):
            raise
        remarks["refused"] = "Not in one graph: here transformers logs a warning amid the forward pass."
        torch._dynamo.reset()
        return _compiled_answer(model, batch, whole=False)


def check_compiles(case: Case) -> None:
    """torch.compile, in one graph and without code generation, gives the answers and gradients of eager."""
    torch._dynamo.reset()
    model, handle = case.adapted()
    batch = case.batch()
    wanted = outputs(model, batch, grad=True)
    loss_of(wanted).backward()
    eager = {n: i.tensor.grad.clone() for n, i in handle.tensors().items() if i.tensor.grad is not None}
    for p in handle.parameters():
        p.grad = None
    found = _compiled_answer(model, batch)
    close(found, wanted, 5e-5, "the compiled answer")
    loss_of(found).backward()
    _close_gradients(
        {n: i.tensor.grad for n, i in handle.tensors().items() if n in eager}, eager, "compiled", 5e-4
    )  # type: ignore[misc]
