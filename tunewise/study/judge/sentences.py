"""What a comparison's figures say, in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tunewise.core.errors import UserError
from tunewise.study.judge.seed_noise import Source
from tunewise.study.judge.statistics import Comparison, Difference
from tunewise.study.report.cells import score as written

__all__ = ["verdict"]

ONE_SEED: Mapping[Source, str] = {
    "lent": "what another seed would change was taken from the other methods for {its}",
    "unknown": "what another seed would change is not in {its}",
}


def verdict(comparison: Comparison, metric: str, baselines: Sequence[str] = ()) -> list[str]:
    """Sentences: the best, which cannot be told apart, whether fine-tuning is worth it, how many rows would tell.

    comparison  against the best of its methods (`compare_to(best_of(table), table)`)
                raises `UserError` if another one is better
    baselines   names of what is no fine-tuning of the model (TF-IDF, zero-shot) or hardly (the linear probe);
                those without scores are passed over, and without any the question of worth is not answered
    """
    best, found = comparison.against, comparison.intervals
    sign = 1 if comparison.higher_is_better else -1
    first = max(found, key=lambda name: sign * found[name].value)
    if sign * found[first].value > sign * found[best].value:
        raise UserError(
            f"{first} is better than {best}: a verdict needs the comparison against the best method."
        )
    top, extreme = found[best], "highest" if comparison.higher_is_better else "lowest"
    said = [
        f"{best} has the {extreme} {metric}: {written(top.value)} ({written(top.low)} to {written(top.high)}), "
        f"measured on {top.rows:,} test rows with {top.seeds} seed{'s' if top.seeds > 1 else ''}."
    ]
    near = [d for d in comparison.differences if d.verdict == "not told apart"]
    if near:
        names = ", ".join([best, *(d.method for d in near)])
        said.append(f"These {len(near) + 1} methods cannot be told apart with this data: {names}.")
    elif comparison.differences:
        said.append("Every other method is further from it than chance explains.")
    known = [name for name in baselines if name in found]
    tuned = [name for name in found if name not in known]
    if known and tuned:
        said.append(_worth(comparison, known, tuned))
    # The open question that matters most: does the baseline reach the best? Else the closest rival.
    rivals = [d for d in near if (d.method in known) != (best in known)] or near
    if rivals:
        said.append(_more_rows(min(rivals, key=lambda d: abs(d.difference)), top.rows))
    for noise, told in ONE_SEED.items():
        single = [name for name in tuned if found[name].seeds == 1 and found[name].noise == noise]
        if single:
            its = "its interval" if len(single) == 1 else "their intervals"
            said.append(f"Only one seed was measured of {', '.join(single)}: {told.format(its=its)}.")
    return said


def _worth(comparison: Comparison, known: Sequence[str], tuned: Sequence[str]) -> str:
    sign, found = 1 if comparison.higher_is_better else -1, comparison.intervals
    plain = max(known, key=lambda name: sign * found[name].value)
    best, value = comparison.against, f"{plain} ({written(found[plain].value)})"
    if best in known:
        equal = [n for n in tuned if comparison[n].verdict == "not told apart"]
        if not equal:
            return f"Fine-tuning is not worth it with this data: every tuned method is worse than {value}."
        first = max(equal, key=lambda name: sign * found[name].value)
        return (
            f"Fine-tuning is not worth it with this data: {value} is as good as {first} "
            f"({written(found[first].value)}) within the noise."
        )
    equal = [n for n in known if comparison[n].verdict == "not told apart"]
    if equal:
        first = max(equal, key=lambda name: sign * found[name].value)
        return (
            f"Fine-tuning is not worth it with this data: {first} ({written(found[first].value)}) is as good "
            f"as {best} ({written(found[best].value)}) within the noise."
        )
    gap = comparison[plain]
    low, high = sorted((abs(gap.low), abs(gap.high)))
    return (
        f"Fine-tuning is worth it: {best} is ahead of the best baseline, {value}, by "
        f"{written(abs(gap.difference))} ({written(low)} to {written(high)})."
    )


def _more_rows(gap: Difference, rows: int) -> str:
    if gap.difference == 0:
        return f"{gap.method} and {gap.against} score the same: there is no difference for more rows to show."
    if gap.rows_needed is None:
        return (
            f"More test rows alone would not tell {gap.method} and {gap.against} apart: "
            "their seeds differ too much, so more seeds are needed."
        )
    return (
        f"To tell {gap.method} and {gap.against} apart, about {_rounded(gap.rows_needed):,} test rows would be "
        f"needed (there are {rows:,}), if the true difference is the measured {written(abs(gap.difference))}."
    )


def _rounded(n: int) -> int:
    """Two digits, upwards: an estimate should not look exact."""
    unit = 10 ** max(0, len(str(n)) - 2)
    return -(-n // unit) * unit
