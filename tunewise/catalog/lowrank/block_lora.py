"""Block-LoRA: an alias of LoRA of rank / blocks with tied copies of B."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.block_lora import BlockLoRA


@method(
    "block_lora",
    title="Block-LoRA (LoRA of rank / blocks with tied copies of B)",
    arxiv="2501.16720",
    lr=(1e-4, 1e-3, 5e-3),
    unverified="no code is public: the sum over blocks follows from the abstract, eight blocks from the title.",
)
def block_lora(
    rank: int = 16,
    blocks: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    sites: str | list[str] = "linear",
) -> Recipe:
    """W' = W + (alpha / rank) (B_1 + ... + B_n) A, n = blocks, A of rank / n rows."""
    return Recipe(delta=BlockLoRA(rank=rank, alpha=alpha, dropout=dropout, sites=sites, blocks=blocks))
