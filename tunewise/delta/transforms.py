"""Fourier and cosine transforms as linear maps with their transposes for derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["cosine_part", "dct", "dct_rows", "idct", "idct_rows"]


def _cosine_part(F: Tensor) -> Tensor:
    """Half of the transform is computed; the real part of the other half is its mirror image."""
    half = torch.fft.rfft2(F, norm="forward").real
    mirror = half[:, 1 : (F.shape[1] + 1) // 2].flip((0, 1)).roll(1, 0)
    return torch.cat([half, mirror], 1)


def _twist(n: int, like: Tensor) -> Tensor:
    """exp(-i pi k / 2n) with the factors that make the transform orthonormal, k = 0 ... n / 2."""
    k = torch.arange(n // 2 + 1, device=like.device, dtype=like.dtype)
    size = torch.full_like(k, math.sqrt(2 / n))
    size[0] = math.sqrt(1 / n)
    return torch.polar(size, -math.pi / (2 * n) * k)


def dct_rows(x: Tensor) -> Tensor:
    """Along the last axis, by a real FFT of the even entries followed by the odd ones backwards."""
    n = x.shape[-1]
    v = torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], -1)
    found = torch.fft.rfft(v) * _twist(n, x)
    return torch.cat([found.real, -found.imag[..., 1 : (n + 1) // 2].flip(-1)], -1)


def idct_rows(X: Tensor) -> Tensor:
    """The inverse, which is the transpose, of `dct_rows`."""
    n = X.shape[-1]
    back = torch.zeros_like(X[..., : n // 2 + 1])
    back[..., 1:] = X[..., n - n // 2 :].flip(-1)
    twist = _twist(n, X)
    v = torch.fft.irfft(torch.complex(X[..., : n // 2 + 1], -back) * twist.conj() / twist.abs().square(), n=n)
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
    "dct": (lambda x: dct_rows(dct_rows(x).mT).mT, "idct"),
    "idct": (lambda x: idct_rows(idct_rows(x).mT).mT, "dct"),
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
