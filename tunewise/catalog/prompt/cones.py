"""ConES: class embeddings are searched for, starting from encoded class names."""

from typing import Literal

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.head.concepts import ConceptHead


@method(
    "cones",
    title="Concept embedding search",
    arxiv="2305.18993",
    lr=(1e-2, 1e-1, 1.0),
    unverified="published for vision-language models; one text encoder for rows and class names is our form of it.",
)
def cones(
    pooling: Literal["mean", "first", "last"] = "mean", temperature: float = 0.07, template: str = "{label}"
) -> Recipe:
    """logits_c = cos(pool(h), e_c) / T, e_c trained, starting at the encoded name of class c; the rest is frozen."""
    return Recipe(head=ConceptHead(pooling=pooling, temperature=temperature, template=template))
