"""MVP: fine-tuning through prompts instead of a new classifier, for robustness."""

from typing import Any

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.existing import ExistingWeights
from tunewise.head.cloze import ClozeHead
from tunewise.objective.adversarial import Adversarial
from tunewise.objective.task_loss import TaskLoss

TEMPLATES = [
    "{text} It was {mask}.",
    "{text} I think {mask}.",
    "{text} The answer is {mask}.",
    "{text} {mask}",
]


@method("mvp", title="Model tuning via prompts (MVP)", arxiv="2303.07320", lr=(1e-5, 1e-4, 3e-4))
def mvp(
    template: str | list[str] = TEMPLATES,  # noqa: B006 - read, never changed
    verbalizer: dict[Any, Any] | None = None,
    pool: str = "max",
    adversarial: float = 0.0,
    radius: float = 1.0,
    steps: int = 1,
) -> Recipe:
    """logits_c = mean over templates of max (or mean) over c's words of the logit at the gap; theta trained.

    No new parameters; `mvp + lora` trains a delta instead of all parameters. adversarial  weight of the loss on
    embeddings changed by `steps` steps within `radius`, 1 in the paper's adversarial variant.
    """
    head = ClozeHead(template=template, verbalizer=verbalizer, pool=pool, stand_in=True)  # type: ignore[arg-type]
    losses = [TaskLoss(), Adversarial(adversarial, radius, steps)] if adversarial else [TaskLoss()]
    return Recipe(head=head, objective=losses, defaults={"delta": ExistingWeights("all")})
