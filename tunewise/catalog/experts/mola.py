"""MoLA: top-k LoRA experts, more of them in some layers than in others."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.experts import LoRAExperts
from tunewise.delta.routing import TopKRoute
from tunewise.diagnose.routing import RouterLog
from tunewise.objective.balance import LoadBalance
from tunewise.objective.task_loss import TaskLoss


@method(
    "mola",
    title="Mixture of LoRA experts with layer-wise expert allocation",
    arxiv="2402.08562",
    lr=(1e-4, 1e-3, 3e-3),
)
def mola(
    experts: int | list[int] = [2, 4, 6, 8],  # noqa: B006 - read, never changed
    k: int | list[int] = 2,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    balance: float = 1e-3,
    sites: str | list[str] = "linear",
) -> Recipe:
    """y = W x + s sum over the top k of (p_i / sum p_j) B_i A_i x, p = softmax(G x), loss + balance N sum f_i P_i.

    `experts` and `k` may be lists, spread over the layers: [2, 4, 6, 8] is the triangle of the paper, [8, 6, 4, 2] its
    inverse, [8, 2, 2, 8] its hourglass, 5 its rectangle.
    """
    return Recipe(
        delta=LoRAExperts(experts, rank, alpha, dropout, TopKRoute(k), sites),
        objective=[TaskLoss(), LoadBalance(balance)],
        diagnose=RouterLog(),
    )
