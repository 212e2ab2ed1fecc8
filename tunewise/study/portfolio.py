"""Which methods are compared, which baselines always run, and at which learning rates each is tried."""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from typing import Any

from tunewise.core.errors import UserError
from tunewise.core.method import get_method, method_names, read_recipe
from tunewise.core.reader import parse, source_of
from tunewise.core.recipe import Recipe

__all__ = [
    "BASELINES",
    "DEFAULT",
    "TUNED_BASELINES",
    "UNKNOWN_PRIOR",
    "fits",
    "prior",
    "rates",
    "read_methods",
]

DEFAULT = {
    "low-rank change of every linear layer": "lora",
    "every weight": "full",
    "the top layers": "partial",
    "the read-out alone": "head_only",
    "a closed solution on frozen features": "linear_probe",
    "a few numbers per layer": "bias_scale",
    "new layers in series": "series_adapter",
    "new layers in parallel": "parallel_adapter",
    "learnt input": "prompt_tuning",
    "learnt keys and values": "prefix_tuning",
    "no backward pass through the backbone": "ladder",
}
"""`default`: one method for each property that decides what tuning costs and what it can change."""

BASELINES = {
    "classification": ("majority", "tfidf", "zero_shot", "few_shot"),
    "image_classification": ("majority",),
    "regression": ("mean", "tfidf"),
    "causal": ("zero_shot", "few_shot"),
}
"""By task; they take part in every comparison where the base model can, and are never tuned."""

TUNED_BASELINES = ("linear_probe", "full")
"""Methods that are added to every comparison, where they fit the task and the memory."""

UNKNOWN_PRIOR = (1e-5, 1e-4, 1e-3)


def read_methods(given: Any = "default", task: str = "classification") -> list[str]:
    """Recipes in `default`, `all`, `a, b, lora(rank=4)`, or a list of such, each once and in order.

    Commas inside brackets and quotes belong to the recipe. `default` and `all` leave out methods that read
    another kind of answer than `task`, or images where rows are texts; one that is named and does not fit is
    refused, as is an unknown one. The baselines that are methods come last, if they were not named.
    """
    items = [given] if isinstance(given, str) else list(given)
    found: list[str] = []
    for text in [one for item in items for one in _split(item)]:
        group = {"default": list(DEFAULT.values()), "all": method_names()}.get(text)
        if group is None and not fits(read_recipe(text), task):
            raise UserError(f"{text} reads another kind of answer than the task {task} has; leave it out.")
        found += [name for name in group if _for_task(name, task)] if group else [text]
    found += [name for name in TUNED_BASELINES if fits(read_recipe(name), task)]
    return list(dict.fromkeys(found))


def _split(text: Any) -> list[str]:
    if not isinstance(text, str):
        raise UserError(f"--methods takes names of methods and recipes, not {text!r}.")
    node = parse(text, "list of methods")
    elements = node.elts if isinstance(node, ast.Tuple | ast.List) else [node]
    if not elements:
        raise UserError("The list of methods is empty; name one, for example default.")
    return [
        e.value if isinstance(e, ast.Constant) and isinstance(e.value, str) else source_of(e)
        for e in elements
    ]


def _for_task(name: str, task: str) -> bool:
    """Whether a method of the catalog reads the task's kind of answer, and takes its kind of rows."""
    images = get_method(name).facts.get("inputs") == "images"
    return fits(read_recipe(name), task) and (task == "image_classification" or not images)


def fits(recipe: Recipe, task: str) -> bool:
    """Whether the recipe reads the kind of answer that the task has; one without a head takes the task's."""
    generates = [getattr(head, "auto", None) == "causal_lm" for head in recipe.essential.get("head", [])]
    return all(one == (task == "causal") for one in generates)


def prior(recipe: Recipe) -> tuple[float, ...]:
    """(low, default, high) of the learning rate; empty for a method that solves instead of descending.

    A recipe that says nothing about its rate gets a wide prior around the rate that `tune` would use.
    """
    if recipe.lr or "loop" in recipe.essential:
        return tuple(recipe.lr)
    return UNKNOWN_PRIOR


def rates(given: Sequence[float], n: int) -> tuple[float | None, ...]:
    """n rates, even in log(rate) over (low, default, high), the default first, then outwards.

    An odd n takes the middles of n equal parts of the prior, each half of it being measured on its own scale;
    an even n takes those of n + 1 parts without the lowest, as the short runs in which rates are first
    compared learn least from it. Without a prior there is one configuration, without a rate. Rates differ
    between methods by orders of magnitude, hence a prior of its own for each and the same n for all.
    """
    if n < 1:
        raise UserError(f"A method needs one configuration at least, not {n}.")
    if not given:
        return (None,)
    if len(given) != 3 or not 0 < given[0] <= given[1] <= given[2] or not math.isfinite(given[2]):
        raise UserError(f"A prior of the learning rate is (low, default, high), not {tuple(given)}.")
    low, default, high = given
    odd = n if n % 2 else n + 1
    places = [(2 * i + 1) / odd - 1 for i in range(odd)][odd - n :]
    places.sort(key=lambda u: (round(abs(u), 9), -u))
    chosen = [default * ((high if u > 0 else low) / default) ** abs(u) for u in places]
    return tuple(dict.fromkeys(float(f"{rate:.3g}") for rate in chosen))
