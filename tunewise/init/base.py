"""B, A <- start(W): where the first values of a low-rank change come from; a start is an option of a delta."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from tunewise.core.delta import P, SiteDelta, keeps_in_out
from tunewise.core.errors import UserError
from tunewise.core.forward import read_weight
from tunewise.core.part import Part
from tunewise.sites import Site

if TYPE_CHECKING:
    from tunewise.core.adaptation import Adaptation

__all__ = ["Init", "Start", "check_rank", "put_start", "site_weight", "start_from_weights", "start_tensors"]


class Start(NamedTuple):
    """A `[..., rank, in]` and B `[..., out, rank]` at step 0."""

    A: Tensor
    B: Tensor


class Init(Part):
    """(A, B) = factors(W, rank, s, found): the start of W' = W + s B A.

    data      whether it reads rows: then it is found in `prepare`, or by `tw.calibrate` (see `DataInit`)
    residual  whether s B A at step 0 is taken away again, so that W' = W + s (B A - B_0 A_0). The base itself
              is not written: the frozen B_0, A_0 stand beside A and B, rank (in + out) more frozen scalars.
    identity  whether W' = W at step 0
    """

    data: ClassVar[bool] = False
    residual: ClassVar[bool] = False
    identity: ClassVar[bool] = True

    def gather(self, adaptation: Adaptation) -> dict[str, Any]:
        """{site: what the start reads beside W}, asked once when the delta is attached."""
        return {}

    def factors(self, W: Tensor, rank: int, s: float, found: Any) -> Start:
        """The start at one site; W `[..., out, in]` in float32 or wider, `found` from `gather` or from rows."""
        raise UserError(f"{type(self).__name__} has no start.")


def start_tensors(init: Init | None, A: Tensor, B: Tensor) -> dict[str, P]:
    """The frozen tensors that a start needs at a site: B_0 and A_0, and whether rows have been seen."""
    found: dict[str, P] = {}
    if init is not None and init.residual:
        found["A0"] = P(torch.zeros_like(A), "direction", trainable=False)
        found["B0"] = P(torch.zeros_like(B), "direction", trainable=False)
    if init is not None and init.data:
        found["calibrated"] = P(torch.zeros((), dtype=torch.bool), "mask", trainable=False)
    return found


def site_weight(place: Site | SiteDelta) -> Tensor:
    """W of a site, detached, `[..., out, in]`: its own rows alone, dequantized, in float32 or wider."""
    if isinstance(place, SiteDelta):
        module, turned = place.root, place.transposed
    else:
        module, turned = place.module, keeps_in_out(place)
    weight = read_weight(module, place.parameter or "weight").detach()
    whole = weight.transpose(-1, -2) if turned else weight
    mine = whole if place.rows is None else whole.index_select(-2, place.rows.to(whole.device))
    return mine.to(torch.promote_types(mine.dtype, torch.float32))


def check_rank(part: Any, site: Site) -> None:
    """Raises `UserError` where W has fewer directions than the start needs, or s is not positive."""
    limit = min(site.in_features or 0, site.out_features or 0)
    name = type(part.init).__name__ if getattr(part, "init", None) is not None else type(part).__name__
    if part.rank > limit:
        raise UserError(
            f"{name}: {site.name} ({site.out_features} x {site.in_features}) has {limit} directions, "
            f"fewer than rank={part.rank}; choose a smaller rank or other sites."
        )
    if part.s <= 0:
        raise UserError(f"{name} divides by alpha / rank, which must be above 0: alpha={part.alpha} is not.")


@torch.no_grad()
def start_from_weights(part: Any, adaptation: Adaptation) -> None:
    """Sets A and B at every site of `part` from `part.init`, unless that waits for rows."""
    init: Init | None = part.init
    t: Any
    mine = [(site, t) for _, site, t in adaptation.sites if t.part is part]
    for site, t in mine if init is not None else ():
        if not {"A", "B"} <= t.meta.keys() or not start_tensors(init, t.A, t.B).keys() <= t.meta.keys():
            raise UserError(f"{type(part).__name__} has a start of its own and takes none as init.")
        check_rank(part, site)
    if init is None or init.data:
        return
    known = init.gather(adaptation)
    for site, t in mine:
        if not t.A.is_meta:  # a model without values is only counted
            put_start(t, init.factors(site_weight(site), part.rank, part.s, known.get(site.name)))


@torch.no_grad()
def put_start(t: Any, start: Start) -> None:
    """Copies a start of the tensors' own size into place, and into their frozen twins where there are any."""
    t.A.copy_(start.A)
    t.B.copy_(start.B)
    if "A0" in t.meta:  # copied from the tensors, so that both are rounded alike and cancel
        t.A0.copy_(t.A)
        t.B0.copy_(t.B)
