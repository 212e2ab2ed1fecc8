"""y_r = f_{a(r)}(x_r): every row of a batch goes through an adaptation of its own, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tunewise.core.adaptation import Existing, handles
from tunewise.core.delta import SiteDelta, forms
from tunewise.core.errors import UserError
from tunewise.core.forward import Forward, Plan, first_tensor
from tunewise.core.handle import Handle
from tunewise.core.plans import plans_of, rebuild, use_plans
from tunewise.post.mix import attached
from tunewise.sites import find_sites, swapped

__all__ = ["rows"]

INPUTS: tuple[str, ...] = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values")
INPUTS += ("decoder_input_ids", "decoder_inputs_embeds", "attention_mask")
SEQUENCE_FIRST = ("longformer", "led", "xlnet")  # their layers see [positions, rows, width]
LEAVES = ("linear", "embedding", "norm", "conv")
NOTHING = Plan()


@contextmanager
def rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """y_r = f_{a(r)}(x_r): inside the block row r of every batch goes through adaptation `names[r]`, None the base.

    The base product is computed once for all rows, thin outputs (low rank, adapters, side networks) for the rows
    that they belong to; where a change is a dense W' or a trained weight of the base, the layer runs once per
    adaptation. Answers equal those of each row alone under `activate`. Weights of a mix do not count here: every
    adaptation acts whole. What was active before is active again after the block.
    Under `generate` a batch may be k times as long (beams, returned sequences): names[r] then stands for the k
    neighbours that `generate` makes of row r. Everywhere else the batch has exactly one row per name.
    Nothing can be attached, switched or merged inside; backward through checkpointed layers belongs inside.
    Raises `UserError` for names that are not attached (with near ones), for batches of another size, and for what
    acts on no row alone: prompts, prefixes, heads with tensors of their own, experts, starts that changed the base.
    """
    chosen = {name: attached(model, name) for name in names if name is not None}
    if "tw_rows" in model.__dict__:
        raise UserError("Inside tw.rows there is no second one: leave it first.")
    if not names:
        raise UserError("tw.rows needs one name (or None for the base) per row of the batch.")
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in SEQUENCE_FIRST:
        raise UserError(
            f"Layers of {kind} see positions before rows: give each adaptation a batch of its own."
        )
    places = find_sites(model) if any(h.existing for h in chosen.values()) else []
    leaves = {s.module for s in places if s.kind in LEAVES and s.role != "position"}
    for handle in chosen.values():
        reason = _rowless(handle, leaves)
        if reason:
            raise UserError(f'"{handle.name}" cannot have rows of a batch: {reason}.')
    batch = _Batch(tuple(names))
    own: Any = model
    with ExitStack() as stack:
        stack.callback(_back, model, [(h, h.active, h.share) for h in handles(model).values()])
        for handle in handles(model).values():
            handle.weigh(1.0)
            if handle.active:
                handle.deactivate()
        use_plans(model, _plans(model, chosen, batch))
        model.__dict__["tw_rows"] = batch
        stack.callback(model.register_forward_pre_hook(batch.enter, with_kwargs=True).remove)
        stack.callback(model.register_forward_hook(batch.leave).remove)
        if hasattr(model, "generate"):
            stack.callback(_put_generate, model, model.__dict__.get("generate"))
            _put_generate(model, _Generate(own.generate, batch))
        yield


def _put_generate(model: nn.Module, function: Any) -> None:
    model.__dict__.pop("generate", None)
    if function is not None:
        model.__dict__["generate"] = function


def _back(model: nn.Module, was: list[tuple[Handle, bool, float]]) -> None:
    model.__dict__.pop("tw_rows", None)
    rebuild(model)
    for handle, active, share in was:
        handle.weigh(share)
        if active:
            handle.activate(only=False)


def _rowless(handle: Handle, leaves: set[nn.Module]) -> str | None:
    """Why rows cannot go through this adaptation beside others, or None."""
    if handle.committed:
        return f"its start changed {next(iter(handle.committed))} of the base, which all rows share"
    if handle.existing and not handle.undo:
        return "its weights were trained in the base itself (undo=False), which all rows share"
    for _, site, t in handle.sites:
        kind, where = type(t.part).__name__, site.name or "the model"
        if set(forms(t.part)) & {"around", "switch"}:
            return f"{kind} adds positions to all rows; give it a batch of its own"
        if t.listens:
            return f"{kind} reads what the whole batch is masked by; give it a batch of its own"
        if t.part.slot == "head" and t.meta:
            return f"{kind} reads the answer outside the model, with tensors of its own"
        if site.kind == "experts":
            return f"{where} sees tokens that a router has sorted, not rows"
        if site.kind == "embedding" and site.role == "position":
            return f"{where} looks up positions, not rows"
    for name, e in handle.existing.items():
        if any(module not in leaves for module, _ in e.places):
            return f"it trains {name}, which belongs to no layer that is called with rows"
    return None


def _plans(model: nn.Module, chosen: dict[str, Handle], batch: _Batch) -> dict[nn.Module, Plan]:
    names = {module: name or "the model" for name, module in model.named_modules()}
    found: dict[nn.Module, dict[str | None, _Branch]] = {}
    for name, handle in chosen.items():
        for module, plan in plans_of([handle], plain=True).items():
            found.setdefault(module, {})[name] = _Branch(plan)
        for key, e in handle.existing.items():
            batch.trained[f'{key} of "{name}"'] = (e, {names[module] for module, _ in e.places})
            for module, parameter in e.places:
                branch = found.setdefault(module, {}).setdefault(name, _Branch(NOTHING))
                branch.own[parameter] = e.ours
    return {m: Plan(rows=_Rows(names[m], branches, batch)) for m, branches in found.items()}


@dataclass
class _Branch:
    """What one adaptation does at one module: its equations and the parameters that it has in the base's place."""

    plan: Plan
    own: dict[str, nn.Parameter] = field(default_factory=dict)

    @property
    def thin(self) -> bool:
        """Whether the base's own product serves: nothing changes before it."""
        return not (self.own or self.plan.inputs or self.plan.weights)


BASE = _Branch(NOTHING)
Groups = dict[str | None, Tensor]


@dataclass
class _Batch:
    """Which adaptation each row belongs to, and how long the batch of the current call is."""

    names: tuple[str | None, ...]
    size: int = 0
    length: int = 1
    generating: bool = False
    known: dict[tuple[int, torch.device], tuple[Groups, Tensor]] = field(default_factory=dict)
    trained: dict[str, tuple[Existing, set[str]]] = field(default_factory=dict)
    called: set[str] = field(default_factory=set)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before every call of the model."""
        given = _given(args, kwargs)
        if given is None:
            raise UserError("tw.rows finds no tensor among the model's arguments whose rows it could count.")
        count, size = len(self.names), len(given)
        if size != count and not (self.generating and size % count == 0):
            raise UserError(
                f"tw.rows has {count} names and the batch has {size} rows: give one name per row."
            )
        self.size, self.length = size, given.shape[1] if given.dim() > 1 else 1

    def leave(self, *_: Any) -> None:
        """After every call of the model: a trained weight that no layer was called with has been passed over."""
        for name, (e, places) in self.trained.items():
            if not places & self.called and not torch.equal(e.ours, e.original):
                raise UserError(f"{name} is trained, and this model uses it without calling its layer.")

    def groups(self, x: Tensor, where: str) -> tuple[Groups, Tensor]:
        """{adaptation: indices of its rows} along the first axis of what a layer gets, and the way back."""
        self.called.add(where)
        if not self.size:
            raise UserError(
                "Inside tw.rows call the model itself: its layers do not know the rows of a batch."
            )
        lead, count = x.shape[0], len(self.names)
        whole = {self.size, count} if self.generating else {self.size}
        flat = {n * self.length for n in whole} if x.dim() < 3 else set()
        if lead not in whole | flat:
            raise UserError(
                f"{where} is called with a first axis of {lead} for a batch of {self.size} rows: rows cannot be told "
                "apart there; give each adaptation a batch of its own."
            )
        key = (lead, x.device)
        if key not in self.known:
            each = torch.arange(lead, device=x.device).view(count, -1)
            found = {
                name: each[[i for i, n in enumerate(self.names) if n == name]].flatten()
                for name in dict.fromkeys(self.names)
            }
            self.known[key] = found, torch.cat(list(found.values())).argsort()
        return self.known[key]


@dataclass
class _Rows:
    """The equations of one module under `rows`: it stands in the module's plan."""

    where: str
    branches: dict[str | None, _Branch]
    batch: _Batch

    def mine(self) -> list[SiteDelta]:
        """Every delta that acts here."""
        return [t for branch in self.branches.values() for t in branch.plan.mine()]

    def __call__(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, put = first_tensor(args, kwargs)
        groups, back = self.batch.groups(x, self.where)
        here = {name: self.branches.get(name, BASE) for name in groups}
        if len(groups) == 1:
            return _whole(forward, here[self.batch.names[0]], args, kwargs)
        parts = []
        if not all(branch.thin for branch in here.values()):
            if any(isinstance(v, Tensor) for v in (*args[1:], *kwargs.values()) if v is not x):
                raise UserError(f"{self.where} takes several tensors: rows cannot be told apart there.")
            for name, index in groups.items():
                parts.append(_whole(forward, here[name], *put(x.index_select(0, index))))
            return torch.cat(parts).index_select(0, back)
        inner = {  # first, as a sub-layer may end inside of the call that it begins with
            name: forward.before(here[name].plan, x.index_select(0, index))
            for name, index in groups.items()
            if here[name].plan
        }
        result = forward.base(*args, **kwargs)
        y: Tensor = result[0] if isinstance(result, tuple) else result
        for name, index in groups.items():
            part = y.index_select(0, index)
            parts.append(forward.after(here[name].plan, inner[name], part) if name in inner else part)
        new = torch.cat(parts).index_select(0, back)
        return (new, *result[1:]) if isinstance(result, tuple) else new


def _whole(forward: Forward, branch: _Branch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with swapped(forward.module, branch.own):
        return forward.run(branch.plan, args, kwargs)


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    named = [kwargs[n] for n in INPUTS if isinstance(kwargs.get(n), Tensor)]
    found = [*(v for v in args if isinstance(v, Tensor)), *named]
    return next(iter([*found, *(v for v in kwargs.values() if isinstance(v, Tensor))]), None)


@dataclass
class _Generate:
    """The model's `generate`, of which the batch knows that it is running."""

    call: Callable[..., Any]
    batch: _Batch

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.batch.enter(nn.Identity(), args, {"inputs": torch.zeros(1, 1), **kwargs})
        self.batch.generating = True
        try:
            return self.call(*args, **kwargs)
        finally:
            self.batch.generating = False
