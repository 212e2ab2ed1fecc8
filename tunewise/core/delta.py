"""A delta is mathematics: equations at a site; everything else is derived from them by the core."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tunewise.sites import Site, device_of, select

from .errors import UserError
from .part import Part

__all__ = ["ORDER", "P", "Delta", "SiteDelta", "TapBuffer", "device_of", "forms", "keeps_in_out"]

ORDER = ("mask", "multiply", "add", "prune", "quantize")
Call = tuple[Tensor, dict[str, Any]]
"""The first tensor of a call and all of its arguments by name."""
FORMS = ("input", "weight", "output", "product", "around", "read", "switch", "existing")


@dataclass(frozen=True)
class P:
    """One tensor of a delta: start value, tag, and the axis that is its unit of size (rank, head, ...)."""

    value: Tensor
    tag: str = "weight"
    axis: int | None = None
    trainable: bool = True
    saved: bool = True


class Delta(Part):
    """A trainable change of the forward pass, given by any of these equations (t holds the site's tensors):

    - `weight(t, W)`: W -> W', both `[out, in]` (`[experts, out, in]` for 3-D experts); mergeable.
    - `input(t, x)`: x -> x' before the site; `output(t, x, y)`: y -> y' after it, `[..., out]`;
      mergeable when `linear = True` (affine in x; the conformance suite checks it).
      Next to `weight`, an `output` is its cheap twin: the core uses whichever fits.
    - `product(t, x, W, b)`: a fused twin of `weight` that replaces the whole product; used when the delta is
      alone at its site and no part asks for the plain form.
    - `read(t, taps, y)`: a side network; `taps` are detached outputs of the sites in `taps`, y the output of
      the site it writes. `switch(model, ts)`: told of every change of what is active (prefixes).
    - `around(t, call, args, kwargs)`: the whole call, for prompts; runs at the root when `kinds =
      ("model",)`.
    - `existing(model)`: names of the backbone's own parameters that are trained.

    `alone` says that `output` reads the base's own weight: it is the twin only where no other `weight` comes
    before. `identity` says that the start changes nothing, `training_only` that nothing is changed outside of
    training, so that merging leaves it out; `order` where a `weight` stands among several (mask, multiply, add,
    prune, quantize); `unit` what the axis of a tensor counts.
    """

    slot: ClassVar[str] = "delta"
    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    linear: ClassVar[bool] = False
    alone: ClassVar[bool] = False
    identity: ClassVar[bool] = True
    training_only: ClassVar[bool] = False
    order: ClassVar[str] = "add"
    unit: ClassVar[str] = "rank"
    taps: ClassVar[str | None] = None
    tap_kinds: ClassVar[tuple[str, ...]] = ("block", "embedding", "norm", "linear")

    def tensors(self, site: Site) -> dict[str, P]:
        """The tensors owned at one site."""
        return {}

    @property
    def positions(self) -> int:
        """How many positions of the model the delta takes away from the input."""
        return 0

    def side_tensors(self, site: Site, taps: Sequence[Site]) -> dict[str, P]:
        """The tensors of a side network that reads `taps` and writes `site`."""
        return self.tensors(site)

    def chosen(self, everything: Sequence[Site]) -> list[Site]:
        """Where it acts: what its option `sites` selects."""
        return select(everything, getattr(self, "sites", "all"), kinds=self.kinds)

    def listens(self, everything: Sequence[Site], taps: Sequence[Site]) -> dict[str, nn.Module]:
        """Modules of whose call a `read` needs the arguments (masks, positions, token ids), by a name of its own."""
        return {}

    def shared(self, sites: Sequence[Site]) -> dict[str, P]:
        """Tensors owned once for all sites, read as `t.shared.NAME`."""
        return {}

    def input(self, t: Any, x: Tensor) -> Tensor:
        """x' = x."""
        return x

    def weight(self, t: Any, W: Tensor) -> Tensor:
        """W' = W."""
        return W

    def output(self, t: Any, x: Tensor, y: Tensor) -> Tensor:
        """y' = y."""
        return y

    def product(self, t: Any, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """y = W' x + b in one fused function."""
        raise UserError(f"{type(self).__name__} has no fused product.")

    def around(self, t: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call itself."""
        return call(*args, **kwargs)

    def read(self, t: Any, taps: list[Tensor], y: Tensor) -> Tensor:
        """y' = y."""
        return y

    @staticmethod
    def switch(model: nn.Module, ts: list[SiteDelta]) -> None:
        """Told of the active tensors whenever they change (none: switched off); acts on the model as a whole."""

    def existing(self, model: nn.Module) -> dict[str, str]:
        """Names of the backbone's own parameters that become trainable, with the tag of each."""
        return {}

    def fusable(self, t: SiteDelta) -> bool:
        """Whether `product` may stand for `weight` at this site now."""
        return True

    def attached(self, adaptation: Any) -> None:
        """Once, when everything is in place: for starts that change the base through `adaptation.commit`."""

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        """The number of trainable scalars at a site, written down independently of `tensors`."""
        return sum(p.value.numel() for p in self.side_tensors(site, taps).values() if p.trainable)


def keeps_in_out(site: Site) -> bool:
    """Whether the weight is stored `[in, out]`: Conv1D, some experts, and every embedding table."""
    return site.transposed or site.kind == "embedding"


def forms(delta: Part) -> tuple[str, ...]:
    """Which equations the delta's class gives."""
    kind: Any = type(delta)
    return _forms(kind)


@cache
def _forms(kind: Any) -> tuple[str, ...]:
    return tuple(f for f in FORMS if getattr(kind, f, None) is not getattr(Delta, f))


class TapBuffer:
    """What the tapped sites left in this forward, in site order, and what the modules listened to were called
    with; shared by the taps and their reader.
    """

    def __init__(self, sites: Sequence[str]) -> None:
        self.sites = list(sites)
        self.values: dict[str, Tensor] = {}
        self.calls: dict[str, Call] = {}

    def take(self) -> list[Tensor]:
        """The taps of this forward; empties the buffer."""
        missing = [s for s in self.sites if s not in self.values]
        if missing:
            raise UserError(f"The side network reads {missing[0]}, which was not called in this forward.")
        values, self.values = [self.values[s] for s in self.sites], {}
        return values


class _Cast:
    """The tensors of a site in another dtype, for one call."""

    def __init__(self, t: SiteDelta, dtype: torch.dtype) -> None:
        self._t, self._dtype = t, dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._t, name)
        if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != self._dtype:
            return value.to(self._dtype)
        if isinstance(value, SiteDelta):
            return _Cast(value, self._dtype)
        return value


class SiteDelta(nn.Module):
    """The tensors of one delta at one site: a child of the site's module, in a dtype of its own."""

    rows: Tensor | None
    buffer: TapBuffer | None
    taps: list[nn.Module]
    listens: dict[str, nn.Module]
    _shared: tuple[SiteDelta, ...]
    _root: tuple[nn.Module]

    def __init__(self, part: Delta, site: Site, tensors: dict[str, P], dtype: torch.dtype) -> None:
        super().__init__()
        self.part, self.parameter, self.transposed = part, site.parameter or "weight", keeps_in_out(site)
        self.site_name, self.kind, self.calls, self.share = site.name, site.kind, 0, 1.0
        self.dtype, self._shared, self.buffer, self.taps = dtype, (), None, []
        self.listens = {}
        self._root = (site.module,)  # in a tuple: a module attribute would be registered as a child
        self.meta = {name: (p.tag, p.axis, p.trainable, p.saved) for name, p in tensors.items()}
        self.register_buffer("rows", site.rows, persistent=False)
        device = device_of(site.module)
        for name, p in tensors.items():
            if p.value.is_meta and device.type != "meta":
                raise UserError(
                    f"{type(part).__name__} starts from weights of {site.name or 'the model'} that are offloaded: "
                    "attach it first, then offload."
                )
            floating = p.value.is_floating_point()
            value = p.value.detach().to(device=device, dtype=dtype if floating else None)
            if value.data_ptr() == p.value.data_ptr() and value.numel():
                value = value.clone()
            if p.trainable:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value, persistent=p.saved)

    @property
    def root(self) -> Any:
        """The module that this delta sits on."""
        return self._root[0]

    @property
    def shared(self) -> Any:
        """Tensors that the delta owns once for all its sites."""
        return self._shared[0]

    def share_of(self, new: Tensor, old: Tensor) -> Tensor:
        """old + share (new - old): the delta's weight in a mix; 1 outside of one."""
        return new if self.share == 1.0 else old.lerp(new.to(old.dtype), self.share)

    def cast(self, dtype: torch.dtype) -> Any:
        """Self, or a view of the tensors in `dtype`."""
        return self if dtype == self.dtype or not dtype.is_floating_point else _Cast(self, dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SiteDelta:
        """Moves with the model, but keeps its own dtype: `model.bfloat16()` is about the backbone."""

        def keep(value: Tensor) -> Tensor:
            moved = fn(value)
            return moved if moved.dtype == value.dtype else value.to(moved.device)

        super()._apply(keep, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """A base checkpoint has none of our keys and still loads with `strict=True`."""
        if any(key.startswith(prefix) for key in state):
            super()._load_from_state_dict(state, prefix, *rest)
