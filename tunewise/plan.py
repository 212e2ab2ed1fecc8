"""What a recipe will do, before it does it: parts, call order, and on a model its sites, tensors and counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunewise.core.handle import Handle
    from tunewise.core.recipe import Recipe

__all__ = ["plan_of"]


def plan_of(recipe: Recipe, handle: Handle | None = None) -> dict[str, Any]:
    """JSON-ready: method, parts, calls (event -> parts in order); with a handle sites, tensors, counts."""
    from tunewise.core.lifecycle import call_order
    from tunewise.core.part import describe_part

    plan: dict[str, Any] = {"method": recipe.name, "lr": list(recipe.lr), "parts": []}
    for slot, part in recipe.parts():
        options = {k: v for k, v in describe_part(part).items() if k != "part"}
        essential = slot in recipe.essential
        plan["parts"].append(
            {"slot": slot, "part": type(part).__name__, "options": options, "essential": essential}
        )
    plan["calls"] = {event: [type(p).__name__ for p in ps] for event, ps in call_order(recipe).items() if ps}
    if handle is None:
        return plan
    tensors = handle.tensors()
    plan["sites"] = [
        {
            "name": site.name or "(model)",
            "kind": site.kind,
            "role": site.role,
            "in": site.in_features,
            "out": site.out_features,
            "part": key,
        }
        for key, site, _ in handle.sites
    ]
    plan["tensors"] = [
        {"name": name, "shape": list(info.tensor.shape), "tag": info.tag, "count": info.tensor.numel()}
        for name, info in tensors.items()
    ]
    plan["trainable"] = sum(info.tensor.numel() for info in tensors.values())
    base = {id(p): p.numel() for n, p in handle.model.named_parameters() if ".tw_" not in f".{n}"}
    plan["total"] = sum(base.values())
    return plan
