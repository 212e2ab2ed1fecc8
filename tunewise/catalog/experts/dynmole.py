"""DynMoLE: LoRA experts whose number per token follows the router's entropy."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.experts import LoRAExperts
from tunewise.delta.routing import EntropyRoute
from tunewise.diagnose.routing import RouterLog
from tunewise.objective.balance import LoadBalance, RouterEntropy
from tunewise.objective.task_loss import TaskLoss


@method(
    "dynmole",
    title="Mixture of LoRA experts with a hybrid routing mechanism",
    arxiv="2504.00661",
    lr=(1e-4, 1e-3, 3e-3),
)
def dynmole(
    experts: int | list[int] = 8,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    mass: float = 0.75,
    keep: int = 2,
    threshold: float = 0.9,
    q: float = 1.1,
    balance: float = 1e-3,
    entropy: float = 1e-2,
    sites: str | list[str] = "linear",
) -> Recipe:
    """y = W x + s sum_i p_i m_i B_i A_i x, m the top-p experts, or all where H_q(p) > threshold.

    The loss gets balance N sum f_i P_i and entropy mean H_q(p). Defaults are those of the published code; the ablations
    of the paper may use another q.
    """
    return Recipe(
        delta=LoRAExperts(experts, rank, alpha, dropout, EntropyRoute(mass, keep, threshold, q), sites),
        objective=[TaskLoss(), LoadBalance(balance, counts=False), RouterEntropy(entropy, q)],
        diagnose=RouterLog(),
    )
