"""CodePrompt: class attention over the mask's hidden states in the last layers."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.existing import ExistingWeights
from tunewise.head.layers import LayersHead


@method("codeprompt", title="CodePrompt", arxiv="2401.05544", lr=(1e-5, 1e-4, 3e-4))
def codeprompt(
    template: str = "{text} In summary , it was {mask} .",
    layers: int = 2,
    query: str = "all",
    dropout: float = 0.0,
) -> Recipe:
    """logits_c = log softmax(W r_c + b)_c, r_c = sum_j softmax_j(H_j . (w_c * d)) H_j at the mask, j last layers."""
    head = LayersHead(template=template, layers=layers, query=query, dropout=dropout)  # type: ignore[arg-type]
    return Recipe(head=head, defaults={"delta": ExistingWeights("all")})
