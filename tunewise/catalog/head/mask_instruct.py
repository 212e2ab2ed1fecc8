"""[MASK] instruct classification: a masked language model chooses among written options."""

from typing import Any

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.existing import ExistingWeights
from tunewise.head.instruct import InstructHead
from tunewise.objective.answer import AnswerLoss


@method("mask_instruct", title="[MASK] instruct classifier", arxiv="2502.03793", lr=(1e-5, 1e-4, 3e-4))
def mask_instruct(
    instruction: str = "Read the text and choose the option that describes it.",
    options: dict[Any, str] | None = None,
    answers: str = "letters",
    open: bool = False,
    mlm: float = 0.0,
    dummy: bool = False,
) -> Recipe:
    """l = -log p(option's token at the mask behind "Answer:"); rows are MLM examples with probability `mlm`."""
    head = InstructHead(instruction=instruction, options=options, answers=answers, open=open)  # type: ignore[arg-type]
    return Recipe(
        head=head,
        objective=AnswerLoss(mlm=mlm, dummy=dummy),
        defaults={"delta": ExistingWeights("all")},
    )
