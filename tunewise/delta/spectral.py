"""W' = W + s T(F): changes with few coefficients in the spectrum of a Fourier or a cosine transform."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from tunewise.core.delta import Delta, P
from tunewise.core.errors import RunError, UserError
from tunewise.core.run import Run
from tunewise.sites import Site

from .fused import changed_linear
from .random import positions
from .transforms import cosine_part, dct_rows, idct, idct_rows

__all__ = ["FourierFT", "LoCA", "place"]


class _Place(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, z: Tensor, rows: int, columns: int) -> Tensor:
        places = _rounded(z, rows, columns)
        ctx.save_for_backward(a, z, places)
        return a.new_zeros(rows, columns).index_put((places[0], places[1]), a, accumulate=True)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        a, z, (i, j) = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return g[i, j], None, None, None
        if torch.is_grad_enabled():
            raise RunError(
                "Locations of coefficients have no second derivative: their first one is an estimate."
            )
        last_i, last_j = g.shape[0] - 1, g.shape[1] - 1
        down = g[(i + 1).clamp(max=last_i), j] - g[(i - 1).clamp(min=0), j]
        right = g[i, (j + 1).clamp(max=last_j)] - g[i, (j - 1).clamp(min=0)]
        return g[i, j], _to_places(a, z, torch.stack([down, right]), g.shape), None, None


_LAST = 0.999


def _to_places(a: Tensor, z: Tensor, differences: Tensor, shape: Sequence[int]) -> Tensor:
    """dL/dz from dL/dF[l + 1] - dL/dF[l - 1] along both axes."""
    inside = (z >= 0) & (z <= _LAST)
    return (0.5 * a * differences).clamp(-1, 1) * inside * z.new_tensor([[n - 1] for n in shape])


def _rounded(z: Tensor, rows: int, columns: int) -> Tensor:
    return (z.detach().clamp(0, _LAST) * z.new_tensor([[rows - 1], [columns - 1]])).round().long()


def place(a: Tensor, z: Tensor, rows: int, columns: int) -> Tensor:
    """F `[rows, columns]` with a_k added at l_k = round(clamp(z_k, 0, 0.999) (rows - 1, columns - 1)).

    dL/dl is the central difference a_k / 2 (dL/dF[l + 1] - dL/dF[l - 1]), clamped to +-1 and with the edges
    repeated, passed straight through the rounding to z `[2, k]`. z has no second derivative.
    """
    return _Place.apply(a, z, rows, columns)  # type: ignore[no-any-return,no-untyped-call]


def _fourier(W: Tensor, c: Tensor, where: Tensor, s: float) -> Tensor:
    spectrum = torch.zeros_like(W, dtype=_wide(c)).index_put((where[0], where[1]), c.to(_wide(c)))
    return torch.add(W, cosine_part(spectrum).to(W.dtype), alpha=s)


def _cosine(W: Tensor, a: Tensor, z: Tensor, s: float) -> Tensor:
    return torch.add(W, idct(place(a.to(_wide(a)), z, *W.shape)).to(W.dtype), alpha=s)


def _wide(c: Tensor) -> torch.dtype:
    return torch.promote_types(c.dtype, torch.float32)  # there is no transform of 16-bit numbers


class _CosineChange(torch.autograd.Function):
    """`idct(place(a, z))` with K times the shorter side in place of the transform along it, and its gradients.

    `waves` are the cosines of the shorter side, a frequency per row.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, z: Tensor, waves: Tensor, rows: int, columns: int) -> Tensor:
        ctx.places, ctx.shape = _rounded(z, rows, columns), (rows, columns)
        ctx.save_for_backward(a, z, waves)
        (i, j), long = ctx.places, max(rows, columns)
        if rows < columns:
            i, j = j, i
        y = a.new_zeros(long, len(waves)).index_add_(0, i, a[:, None] * waves[j])
        found = idct_rows(y.mT.contiguous())
        return found if rows < columns else found.mT

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RunError("The fused cosine change has no second derivative: attach with plain=True.")
        a, z, waves = ctx.saved_tensors
        flip = ctx.shape[0] < ctx.shape[1]
        i, j = ctx.places.flip(0) if flip else ctx.places
        half = dct_rows(g if flip else g.mT).mT.contiguous()
        last_i, last_j = len(half) - 1, len(waves) - 1

        def at(i: Tensor, j: Tensor) -> Tensor:
            return (half[i] * waves[j]).sum(1)

        to_a = at(i, j) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return to_a, None, None, None, None
        down = at((i + 1).clamp(max=last_i), j) - at((i - 1).clamp(min=0), j)
        right = at(i, (j + 1).clamp(max=last_j)) - at(i, (j - 1).clamp(min=0))
        slopes = (right, down) if flip else (down, right)
        return to_a, _to_places(a, z, torch.stack(slopes), ctx.shape), None, None, None


def _cosine_thin(W: Tensor, a: Tensor, z: Tensor, waves: Tensor, s: float) -> Tensor:
    wide = _wide(a)
    change: Tensor = _CosineChange.apply(a.to(wide), z, waves.to(wide), *W.shape)  # type: ignore[no-untyped-call]
    return torch.add(W, change.to(W.dtype), alpha=s)


class FourierFT(Delta):
    """W' = W + s Re(ifft2(F)), F zero but for `frequencies` trained real coefficients c at random places.

    The places are the first of a permutation of all, seeded by `seed`: the same in all sites of one shape,
    and those of PEFT, so that they need not be saved. c starts at 0, so that W' = W (PEFT's own default is
    N(0, 1), which changes the model at step 0). A weight with fewer entries than `frequencies` has them all.

    The dense change is built once per step by a real FFT, about in * out * log(in * out), whatever the number
    of tokens; as cosines and sines times x it would take 4 K (in + out) per token, which is dearer from K =
    in out / (4 (in + out)) on: 48 for a width of 384. Trainable scalars: K per site. Source: arXiv 2405.03003.
    """

    frequencies: PositiveInt = 1000
    scale: float = 150.0
    seed: NonNegativeInt = 777
    sites: str | list[str] = "linear"

    def shared(self, sites: Sequence[Site]) -> dict[str, P]:
        shapes = {(s.out_features or 0, s.in_features or 0) for s in sites}
        return {
            f"places_{m}x{n}": P(
                positions(m, n, self.frequencies, self.seed), "mask", trainable=False, saved=False
            )
            for m, n in sorted(shapes)
        }

    def tensors(self, site: Site) -> dict[str, P]:
        return {"coefficients": P(torch.zeros(self.formula(site)), "weight")}

    def _theta(self, t: Any, W: Tensor) -> tuple[Tensor, Tensor]:
        where = getattr(t.shared, f"places_{W.shape[0]}x{W.shape[1]}")
        return t.coefficients, where.to(W.device)

    def weight(self, t: Any, W: Tensor) -> Tensor:
        return _fourier(W, *self._theta(t, W), s=self.scale)

    def product(self, t: Any, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return changed_linear(partial(_fourier, s=self.scale), x, W, b, *self._theta(t, W))

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        return min(self.frequencies, (site.in_features or 0) * (site.out_features or 0))


class LoCA(Delta):
    """W' = W + s C_out^T F C_in (inverse DCT), F with trained coefficients a_k at trained places: `place`.

    a starts at 0 (W' = W), locations z uniform in (0, 1). By optimizer step: `coefficient_span` steps on a, then
    `location_span` on z, the other one frozen, until step `location_steps`, from where on a alone is trained.
    None: a tenth of the run, but at least one such cycle where that is less than half of the run; one cycle
    where the length is not known. The authors count training forwards instead, which gradient accumulation
    would break. z needs float32 or wider: `UserError` else.

    Trainable scalars: 3 K per site, of which 2 K become K pairs of integers. Source: arXiv 2502.06820. Not
    here: dropout of x on the changed path, which would cost a second product of W's size.
    """

    frequencies: PositiveInt = 1000
    scale: float = 1.0
    coefficient_span: PositiveInt = 10
    location_span: NonNegativeInt = 20
    location_steps: NonNegativeInt | None = None
    sites: str | list[str] = "linear"

    def _count(self, site: Site) -> int:
        return min(self.frequencies, (site.in_features or 0) * (site.out_features or 0))

    def shared(self, sites: Sequence[Site]) -> dict[str, P]:
        sizes = {min(s.out_features or 0, s.in_features or 0) for s in sites}
        cosines = {n: dct_rows(torch.eye(n)).mT.contiguous() for n in sorted(sizes)}
        return {f"waves_{n}": P(c, "mask", trainable=False, saved=False) for n, c in cosines.items()}

    def tensors(self, site: Site) -> dict[str, P]:
        count = self._count(site)
        return {
            "coefficients": P(torch.zeros(count), "weight"),
            "locations": P(torch.rand(2, count), "mask"),
        }

    def attached(self, adaptation: Any) -> None:
        if adaptation.dtype.itemsize < 4:
            raise UserError(
                f"LoCA keeps locations as real numbers, which {adaptation.dtype} rounds to other places: "
                "attach with dtype=torch.float32."
            )

    def weight(self, t: Any, W: Tensor) -> Tensor:
        return _cosine(W, t.coefficients, t.locations, self.scale)

    def product(self, t: Any, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        waves = getattr(t.shared, f"waves_{min(W.shape)}")
        return changed_linear(
            partial(_cosine_thin, s=self.scale), x, W, b, t.coefficients, t.locations, waves
        )

    def prepare(self, run: Run) -> None:
        self._turn(run)

    def after_step(self, run: Run) -> None:
        self._turn(run)

    def trained(self, step: int, total: int) -> str:
        """Which of its tensors step number `step` (from 0) of `total` (0: not known) trains."""
        cycle = self.coefficient_span + self.location_span
        until = self.location_steps
        if until is None:
            until = max(total // 10, min(cycle, total // 2)) if total else cycle
        early = step % cycle < self.coefficient_span
        return "coefficients" if step >= until or early else "locations"

    def _turn(self, run: Run) -> None:
        trained = self.trained(run.step, run.total_steps)
        for name, info in run.tensors.all().items():
            if info.part is self:
                mine = name.endswith(f".{trained}")
                if mine and name in run.tensors.frozen:
                    run.tensors.thaw(name)
                elif not mine and name not in run.tensors.frozen:
                    run.tensors.freeze(name)

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        return 3 * self._count(site)
