"""W' = W + s T(F): changes with few coefficients in the spectrum of a Fourier or a cosine transform."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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

__all__ = ["FourierFT", "LoCA", "cosine_part", "dct", "idct", "place"]


def _cosine_part(F: Tensor) -> Tensor:
    """Half of the transform is computed; the real part of the other half is its mirror image."""
    half = torch.fft.rfft2(F, norm="forward").real
    mirror = half[:, 1 : (F.shape[1] + 1) // 2].flip((0, 1)).roll(1, 0)
    return torch.cat([half, mirror], 1)


def _twist(n: int, like: Tensor, size: float = 1.0) -> Tensor:
    """exp(-i pi k / 2n) with the factors that make the transform orthonormal, to the power `size`, k = 0 ... n / 2."""
    k = torch.arange(n // 2 + 1, device=like.device, dtype=like.dtype)
    length = torch.full_like(k, math.sqrt(2 / n) ** size)
    length[0] = math.sqrt(1 / n) ** size
    return torch.polar(length, -size * math.pi / (2 * n) * k)


def _dct(x: Tensor) -> Tensor:
    """Along the last axis, by a real FFT of the even entries followed by the odd ones backwards."""
    n = x.shape[-1]
    v = x.new_empty(x.shape)
    v[..., : (n + 1) // 2], v[..., (n + 1) // 2 :] = x[..., ::2], x[..., 1::2].flip(-1)
    found = torch.fft.rfft(v).mul_(_twist(n, x))
    v[..., : n // 2 + 1] = found.real
    v[..., n // 2 + 1 :] = found.imag[..., 1 : (n + 1) // 2].flip(-1).neg_()
    return v


def _idct(X: Tensor) -> Tensor:
    """The inverse, which is the transpose, of `_dct`."""
    n = X.shape[-1]
    both = X.new_zeros(*X.shape[:-1], n // 2 + 1, 2)
    both[..., 0] = X[..., : n // 2 + 1]
    both[..., 1:, 1] = X[..., n - n // 2 :].flip(-1).neg_()
    v = torch.fft.irfft(torch.view_as_complex(both).mul_(_twist(n, X, -1.0)), n=n)
    x = torch.empty_like(v)
    x[..., ::2], x[..., 1::2] = v[..., : (n + 1) // 2], v[..., (n + 1) // 2 :].flip(-1)
    return x


class _Map(torch.autograd.Function):
    """A linear map with its transpose for a derivative, as often as one likes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, which: str) -> Tensor:
        return _MAPS[which][0](x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.which = inputs[1]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return _applied(g, _MAPS[ctx.which][1]), None


def _applied(x: Tensor, which: str) -> Tensor:
    if torch.compiler.is_compiling():
        return _MAPS[which][0](x)
    return _Map.apply(x, which)  # type: ignore[no-any-return,no-untyped-call]


_MAPS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "cosine_part": (_cosine_part, "cosine_part"),
    "dct": (lambda x: _dct(_dct(x).mT).mT, "idct"),
    "idct": (lambda x: _idct(_idct(x).mT).mT, "dct"),
}


def cosine_part(F: Tensor) -> Tensor:
    """Re(ifft2(F)) of a real F `[m, n]`: sum_uv F[u, v] cos(2 pi (u i / m + v j / n)) / (m n); symmetric as a map."""
    return _applied(F, "cosine_part")


def dct(x: Tensor) -> Tensor:
    """C_m x C_n^T, the orthonormal two-dimensional DCT-II of x `[m, n]`."""
    return _applied(x, "dct")


def idct(F: Tensor) -> Tensor:
    """C_m^T F C_n, the inverse and the transpose of `dct`."""
    return _applied(F, "idct")


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
        slopes = (0.5 * a * torch.stack([down, right])).clamp(-1, 1)
        inside = (z >= 0) & (z <= _LAST)
        return g[i, j], slopes * inside * z.new_tensor([[last_i], [last_j]]), None, None


_LAST = 0.999


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
        return changed_linear(partial(_cosine, s=self.scale), x, W, b, t.coefficients, t.locations)

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
