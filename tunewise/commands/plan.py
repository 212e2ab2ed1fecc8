"""What a recipe will do: its parts, the call order, and on a model its sites, tensors and counts."""

from __future__ import annotations

from typing import Any

from .console import number, settings, table

__all__ = ["plan_view"]

EVENT_WORDS = {
    "prepare": "once, before the first step",
    "select": "rows of a step, before micro-batches are cut",
    "before_step": "before every step",
    "gradients": "every step, gradients complete",
    "after_step": "after every step",
    "boundary": "end of an epoch, task, round or stage",
    "finish": "once, after the last step",
}


def _options(options: dict[str, Any]) -> str:
    def text(value: Any) -> str:
        if isinstance(value, dict) and "part" in value:
            inner = {k: v for k, v in value.items() if k != "part"}
            return f"{value['part']}({_options(inner)})"
        return repr(value)

    return ", ".join(f"{k}={text(v)}" for k, v in options.items())


def plan_view(plan: dict[str, Any], most: int = 24) -> Any:
    """The plan as tables; of many sites or tensors the first `most` and how many more there are."""
    from rich.console import Group

    shown: list[Any] = []
    facts = {k: plan[k] for k in ("method", "task", "model", "data") if plan.get(k)}
    rates = plan.get("lr") or []
    if isinstance(rates, (int, float)):
        facts["learning rate"] = rates
    elif rates:
        facts["learning rate"] = " | ".join(number(rate) for rate in rates) + "  (low | default | high)"
    if "trainable" in plan:
        share = (
            f" of {plan['total']:,} ({plan['trainable'] / plan['total']:.2%})" if plan.get("total") else ""
        )
        facts["trainable"] = f"{plan['trainable']:,}{share}"
    shown.append(settings(facts))
    if plan.get("parts"):
        rows = [
            [p["slot"], p["part"], _options(p["options"]), "" if p.get("essential", True) else "default"]
            for p in plan["parts"]
        ]
        shown.append(table(["slot", "part", "options", ""], rows))
    if plan.get("sites"):
        names = ["name", "kind", "role", "in", "out", "part"]
        shown.append(_some("sites", names, plan["sites"], most))
    if plan.get("tensors"):
        tensors = [{**t, "shape": " x ".join(map(str, t["shape"]))} for t in plan["tensors"]]
        shown.append(_some("tensors", ["name", "shape", "tag", "count"], tensors, most))
    calls = [
        [f"{index}. {event}", EVENT_WORDS.get(event, ""), ", ".join(names)]
        for index, (event, names) in enumerate((plan.get("calls") or {}).items(), start=1)
    ]
    shown.append(table(["call order", "when", "parts"], calls) if calls else "No part asks to be called.")
    return Group(*shown)


def _some(what: str, columns: list[str], items: list[dict[str, Any]], most: int) -> Any:
    rows = [[item.get(c) for c in columns] for item in items[:most]]
    more = len(items) - len(rows)
    title = f"{len(items):,} {what}" + (f", the first {len(rows)}" if more else "")
    return table(columns, rows, title=title)
