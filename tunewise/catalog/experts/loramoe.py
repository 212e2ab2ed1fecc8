"""LoRAMoE: soft-routed LoRA experts in the FFN, half of which prefer one kind of rows."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.experts import LoRAExperts
from tunewise.diagnose.routing import RouterLog
from tunewise.objective.balance import LocalBalance
from tunewise.objective.task_loss import TaskLoss


@method("loramoe", title="LoRA experts with localised balancing", arxiv="2312.09979", lr=(3e-4, 3e-3, 1e-2))
def loramoe(
    experts: int | list[int] = 8,
    rank: int = 4,
    alpha: float = 32.0,
    dropout: float = 0.0,
    balance: float = 0.1,
    delta: float = 0.1,
    field: str | None = None,
    first: list[str] = ["1"],  # noqa: B006 - read, never changed
    sites: str | list[str] = "mlp",
) -> Recipe:
    """y = W x + s sum_i softmax(G x)_i B_i A_i x, loss + balance sum over sites of var(Z) / mean(Z)^2.

    `field` names a column of the training rows; rows whose value is in `first` are given the first half of the experts.
    """
    return Recipe(
        delta=LoRAExperts(experts, rank, alpha, dropout, sites=sites),
        objective=[TaskLoss(), LocalBalance(balance, delta, field, first)],
        diagnose=RouterLog(),
    )
