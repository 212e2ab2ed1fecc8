"""Quantized Side Tuning: a side transformer beside a backbone in 4 bits, with low-rank downsamplers."""

from typing import Literal

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.side_chain import QuantizedSide


@method(
    "qst",
    title="Quantized Side Tuning (QST)",
    arxiv="2401.07159",
    lr=(5e-4, 2e-3, 5e-3),
    unverified="The pooling downsamplers follow the paper's words alone; low_rank is the released code's.",
)
def qst(
    reduction: int = 16,
    inner: int = 16,
    pooling: Literal["low_rank", "max", "average"] = "low_rank",
    taps: str = "block",
    sites: str | list[str] = "end",
) -> Recipe:
    """y' = g y + (1 - g) Up norm(s_L), s_i = block_i(m_i s_{i-1} + (1 - m_i) LN(B_i silu(A_i h_i))), gates g, m_i."""
    return Recipe(
        delta=QuantizedSide(reduction=reduction, inner=inner, pooling=pooling, taps=taps, sites=sites)
    )
