"""MVLPT, text form: one prompt trained on several source tasks, then the start for each target."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.prompt import SoftPrompt
from tunewise.head.class_sets import ClassSetHead
from tunewise.init.saved import FromSaved


@method("mvlpt", title="Multitask prompt, transferred (text form)", arxiv="2211.11720", lr=(3e-3, 1e-2, 3e-2))
def mvlpt(
    tokens: int = 16, start: str | None = None, separator: str = "/", text: str | None = None
) -> Recipe:
    """f([P; E(x)]), one P for tasks t with classes "t/c": softmax over the row's own task; then P starts the target.

    First on the rows of all source tasks together, then on each target task with start="folder of the first run".
    """
    prompt = SoftPrompt(tokens, text=text)
    deltas = [prompt, FromSaved(start)] if start else [prompt]
    return Recipe(delta=deltas, head=ClassSetHead(separator=separator))
