"""Connected adapters: a path beside the encoder joins the adapters inside it."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.connected import ConnectedAdapters


@method(
    "connected_adapters",
    title="Connected adapters, inside and aside",
    arxiv="2208.09847",
    lr=(1e-4, 1e-3, 5e-3),
    unverified="What the aside modules read and where they write follows the abstract; the paper's three variants "
    "could not be read.",
)
def connected_adapters(
    size: int = 16, aside: int = 16, function: str = "relu", sites: str | list[str] = "block"
) -> Recipe:
    """h_l = y_l + U_l (a_l + R_l s_{l-1}) + c_l, a_l = f(D_l y_l + b_l), s_l = s_{l-1} + Side_l([s_{l-1}; a_l])."""
    return Recipe(delta=ConnectedAdapters(size, aside, function, sites))  # type: ignore[arg-type]
