"""Only the optimizer slot holds the optimizer: others ask here to add, drop, freeze, thaw, replace or reset."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .adaptation import Info
from .errors import UserError, did_you_mean

if TYPE_CHECKING:
    from tunewise.sites import Site

    from .adaptation import Adaptation

__all__ = ["Tensors"]


class Tensors:
    """The trainable tensors of a run by name; changes act between two steps and move the optimizer's state
    along.
    """

    def __init__(self, adaptation: Adaptation) -> None:
        self.adaptation = adaptation
        self.optimizer: torch.optim.Optimizer | None = None
        self.frozen: set[str] = set()
        self.dropped: set[str] = set()
        self.in_step = False
        self._waiting: list[Callable[[], None]] = []

    def all(self) -> dict[str, Info]:
        """Every trainable tensor of the adaptation, frozen ones too."""
        return self.adaptation.tensors()

    def active(self) -> Iterator[tuple[str, Info]]:
        """(name, info) of the tensors that are trained now, one at a time."""
        for name, info in self.all().items():
            if name not in self.frozen and name not in self.dropped:
                yield name, info

    def info(self, name: str) -> Info:
        """One tensor; raises `UserError` with near names."""
        found = self.all()
        if name not in found:
            raise UserError(f"The run has no trainable tensor {name}{did_you_mean(name, found)}")
        return found[name]

    def _do(self, change: Callable[[], None]) -> None:
        if self.in_step:
            self._waiting.append(change)
        else:
            change()

    def settle(self) -> None:
        """Carries out what was asked for in the middle of a step."""
        self.in_step = False
        waiting, self._waiting = self._waiting, []
        for change in waiting:
            change()

    def freeze(self, name: str, forget: bool = False) -> None:
        """No gradient from the next step on; with `forget` the optimizer's moments go too."""

        def change() -> None:
            tensor = self.info(name).tensor
            tensor.requires_grad_(False)
            tensor.grad = None
            self.frozen.add(name)
            if forget and self.optimizer is not None:
                self.optimizer.state.pop(tensor, None)

        self._do(change)

    def thaw(self, name: str) -> None:
        """Trained again from the next step on."""

        def change() -> None:
            self.info(name).tensor.requires_grad_(True)
            self.frozen.discard(name)

        self._do(change)

    def drop(self, name: str) -> None:
        """Leaves the optimizer for good; the value stays in the forward pass."""

        def change() -> None:
            tensor = self.info(name).tensor
            tensor.requires_grad_(False)
            self.dropped.add(name)
            for group in self.optimizer.param_groups if self.optimizer else ():
                group["params"] = [p for p in group["params"] if p is not tensor]
            if self.optimizer is not None:
                self.optimizer.state.pop(tensor, None)

        self._do(change)

    def add(self, name: str) -> None:
        """A tensor that was dropped enters the optimizer again, without moments, in its group."""

        def change() -> None:
            info = self.info(name)
            info.tensor.requires_grad_(True)
            self.dropped.discard(name)
            if self.optimizer is None or any(
                info.tensor is p for g in self.optimizer.param_groups for p in g["params"]
            ):
                return
            homes = {g.get("tag"): g for g in self.optimizer.param_groups}
            own = homes.get(f"{info.tag}.{name.rpartition('.')[2]}", homes.get(info.tag))
            home = own or self.optimizer.param_groups[0]
            home["params"].append(info.tensor)

        self._do(change)

    def replace(self, name: str, move: Callable[[Tensor], Tensor]) -> None:
        """value <- move(value), also to another shape; `move` acts on every optimizer state of the same
        shape.
        """

        def change() -> None:
            old = self.info(name).tensor
            new = nn.Parameter(move(old.detach()), requires_grad=old.requires_grad)
            self.adaptation.put(name, new)
            self._carry(old, new, move)

        self._do(change)

    def _carry(self, old: nn.Parameter, new: nn.Parameter, move: Callable[[Tensor], Tensor]) -> None:
        if self.optimizer is None:
            return
        for group in self.optimizer.param_groups:
            group["params"] = [new if p is old else p for p in group["params"]]
        state = self.optimizer.state.pop(old, None)
        if state:
            same = {k: torch.is_tensor(v) and v.shape == old.shape for k, v in state.items()}
            self.optimizer.state[new] = {k: move(v) if same[k] else v for k, v in state.items()}

    def reset(self, name: str, index: Tensor, axis: int = 0, value: float = 0.0) -> None:
        """Rows `index` along `axis` become `value`, and the optimizer forgets them."""

        def change() -> None:
            tensor = self.info(name).tensor
            with torch.no_grad():
                tensor.index_fill_(axis, index, value)
            for state in self.optimizer.state.get(tensor, {}).values() if self.optimizer else ():
                if torch.is_tensor(state) and state.shape == tensor.shape:
                    state.index_fill_(axis, index, 0.0)

        self._do(change)

    def sizes(self) -> dict[str, int]:
        """{site and delta: number of units (rank, heads, rows)} of everything that has a unit."""
        found = {}
        for key, site, t in self.adaptation.sites:
            for name, (_, axis, trainable, _) in t.meta.items():
                if axis is not None and trainable:
                    found[_where(key, site)] = getattr(t, name).shape[axis]
        return found

    def resize(self, where: str, n: int, keep: Tensor | None = None) -> None:
        """Units `keep` (default: the first ones) stay, in their order, moments included; new units start at
        0.

        `where` is a key of `sizes()`. A pair of zero factors would stay zero for ever, so the units added to
        a tensor that does not start at zero take fresh values from the delta's own start.
        """
        if where not in self.sizes():
            raise UserError(f"There is nothing to resize at {where}{did_you_mean(where, self.sizes())}")
        key_site = next((k, s, t) for k, s, t in self.adaptation.sites if _where(k, s) == where)
        _, site, t = key_site
        start = t.part.tensors(site)
        for name, (_, axis, trainable, _) in t.meta.items():
            if axis is not None and trainable:
                self.replace(f"{where}.{name}", _resizer(axis, n, keep, start[name].value.to(t.dtype)))


def _where(key: str, site: Site) -> str:
    return f"{site.name}.{key}" if site.name else key


def _resizer(axis: int, n: int, keep: Tensor | None, start: Tensor) -> Callable[[Tensor], Tensor]:
    first = [True]

    def move(value: Tensor) -> Tensor:
        is_value, first[0] = first[0], False
        index = (
            torch.arange(min(n, value.shape[axis]), device=value.device)
            if keep is None
            else keep.to(value.device)
        )
        kept = value.index_select(axis, index)
        more = n - kept.shape[axis]
        if more <= 0:
            return kept
        shape = list(kept.shape)
        shape[axis] = more
        room = start.to(value.device, value.dtype).narrow(axis, 0, min(more, start.shape[axis]))
        extra = value.new_zeros(shape)
        if is_value:
            extra.narrow(axis, 0, room.shape[axis]).copy_(room)
        return torch.cat([kept, extra], axis)

    return move
