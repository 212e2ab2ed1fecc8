"""HST: a pyramid of small transformer blocks beside a frozen vision transformer."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.existing import ExistingWeights
from tunewise.delta.hst import HierarchicalSide, MetaHierarchicalSide, MetaTokens
from tunewise.head import GivenHead


@method(
    "hst",
    title="Hierarchical side tuning (HST)",
    arxiv="2310.05393",
    lr=(2e-3, 5e-3, 1e-2),
    inputs="images",
    unverified="Without meta tokens the class token stands for them, and batch norms are norms of each row by itself.",
)
def hst(
    widths: tuple[int, ...] = (32, 48, 64, 72), heads: tuple[int, ...] = (2, 4, 8, 12), meta: bool = False
) -> Recipe:
    """y' = C LN(mean x), x <- x + Attention(x; [g_i, mean h_i]) + resize(h_i), x <- x + MLP(x), stage by stage."""
    if not meta:
        return Recipe(delta=HierarchicalSide(widths=widths, heads=heads), head=GivenHead())
    norms = ExistingWeights(sites="norm & layers[0:]")
    deltas = [MetaTokens(), norms, MetaHierarchicalSide(widths=widths, heads=heads)]
    return Recipe(delta=deltas, head=GivenHead())
