"""`tunewise methods` and `tunewise show`: the catalog, and what one recipe does."""

from __future__ import annotations

from typing import Annotated, Any

from cyclopts import Parameter

from tunewise.plan import plan_of

from .console import Output, table
from .plan import plan_view

__all__ = ["methods", "show"]

QUIET = Output()


def methods(
    *,
    area: Annotated[str | None, Parameter(help="Only this area, for example lowrank.")] = None,
    output: Output = QUIET,
) -> None:
    """List all methods: name, area, what it is, its equation."""
    from tunewise.core.errors import UserError, did_you_mean
    from tunewise.core.method import get_method, method_names

    found = [get_method(name) for name in method_names()]
    areas = sorted({m.area for m in found})
    if area is not None and area not in areas:
        raise UserError(f'There is no area "{area}"{did_you_mean(area, areas)}')
    chosen = sorted((m for m in found if area in (None, m.area)), key=lambda m: (m.area, m.name))
    described = [_describe(m) for m in chosen]
    rows = [[d["area"], d["name"], d["title"], d["formula"]] for d in described]
    output.result(described, human=table(["area", "method", "title", "equation"], rows))


def _describe(method: Any) -> dict[str, Any]:
    options = {
        name: None if p.default is p.empty else p.default for name, p in method.signature.parameters.items()
    }
    facts = {k: v for k, v in method.facts.items() if k not in ("lr", "title")}
    return {
        "name": method.name,
        "area": method.area,
        "title": method.facts.get("title", method.name),
        "formula": method.formula,
        "lr": list(method.lr),
        "options": options,
        **facts,
    }


def show(
    method: Annotated[str, Parameter(help='For example lora, "lora(rank=4)" or my.yaml.')],
    /,
    *,
    model: Annotated[str | None, Parameter(help="Show sites, tensors and counts on this model.")] = None,
    output: Output = QUIET,
) -> None:
    """Show the parts of a method and the order of their calls; with --model also sites, tensors and counts.

    For example:

    ```
    tunewise show lora
    tunewise show "lora(rank=4, sites='query | value')" --model minilm
    ```
    """
    from tunewise.core.compat import check
    from tunewise.core.method import read_recipe

    recipe = read_recipe(method)
    check(recipe)
    handle = None if model is None else _attach(recipe, model)
    plan = plan_of(recipe, handle)
    if model is not None:
        plan["model"] = model
    output.result(plan, human=plan_view(plan))


def _attach(recipe: Any, name: str) -> Any:
    """Attaches on the meta device: shapes and counts without loading a weight."""
    from tunewise.backbone import backbone_config, load
    from tunewise.core.handle import attach

    config = backbone_config(name)
    auto = next((head.auto_for(config) for head in recipe["head"]), "base")
    labels = ["0", "1"] if auto in ("sequence_classification", "image_classification") else None
    model, _ = load(name, auto=auto, labels=labels, meta=True)
    return attach(model, recipe, undo=False)
