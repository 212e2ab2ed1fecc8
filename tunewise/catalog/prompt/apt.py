"""APT: what prompts would add to an attention's answer, without attending to them."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.approximated_prompt import ApproximatedPrompt


@method("apt", title="Approximated prompt tuning", arxiv="2306.15706", lr=(1e-4, 1e-3, 1e-2))
def apt(tokens: int = 200, rank: int = 4, sites: str | list[str] = "attention") -> Recipe:
    """y' = e^s (y + w a T), a = relu(x K'), K = T + T M_1 M_2, w = max_j a_j without gradient."""
    return Recipe(delta=ApproximatedPrompt(tokens, rank, sites))
