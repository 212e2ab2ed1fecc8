"""OFT: orthogonal fine-tuning."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.oft import OFT, ConstrainedOFT


@method("oft", title="Orthogonal fine-tuning", arxiv="2306.07280", lr=(1e-4, 5e-4, 2e-3))
def oft(
    block_size: int = 32,
    terms: int = 5,
    block_share: bool = False,
    coft: bool = False,
    eps: float = 6e-5,
    sites: str | list[str] = "linear",
) -> Recipe:
    """W' = W R^T, R block-diagonal and orthogonal, by Cayley's map."""
    options = {"block_size": block_size, "terms": terms, "block_share": block_share, "sites": sites}
    if coft:
        return Recipe(delta=ConstrainedOFT(**options, eps=eps))  # type: ignore[arg-type]
    return Recipe(delta=OFT(**options))  # type: ignore[arg-type]
