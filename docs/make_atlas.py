"""docs/atlas.md: every method of the catalog in one table, from its docstring and from result files.

    python docs/make_atlas.py        # or `make atlas`

What a method can do is what the conformance suite found (benchmarks/results/capabilities.json, `make capabilities`);
how well it trains is what benchmarks/deltas.py measured (benchmarks/results/deltas.json). Nothing is written by hand.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tunewise.core.checkpoint import write_text
from tunewise.core.method import Method, get_method, method_names

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CAPABILITIES = {
    "merge": "merge_equals_unmerged",
    "as LoRA": "plain_lora_is_as_exact_as_it_says",
    "PEFT": "peft_answers_the_same_or_is_refused",
    "base at step 0": "step_zero_is_the_base",
    "8-bit base": "quantized_base_works_or_is_refused",
    "gradient checkpointing": "gradient_checkpointing_equals_eager",
    "compile": "compiled_equals_eager",
    "several": "two_adaptations_apart",
}
COUNTED = "trainable_count_equals_formula"
PROBE = "linear_probe"  # the measure of the others, without a row of its own
INTRODUCTION = """# Atlas of methods

Written by `make atlas` from the catalog and from result files; not by hand. `tunewise methods` lists the same methods,
`tunewise show METHOD` the parts of one, `tunewise show METHOD --model MODEL` what it trains there.

Columns from *merge* to *several* are what the conformance suite measured on two small models (an encoder and a
decoder): yes, no (refused in words, below), an empty cell where it was not tried, "failed" where a check does not pass.

- **merge**: W' can be written into the base weights, with the same answers, and undone bit by bit
- **as LoRA**: `tunewise export --to lora` is exact, or as far off as it says (|dW - B A| / |dW| at random tensors)
- **PEFT**: `tunewise export --to peft` is loaded by PEFT with the same answers
- **base at step 0**: training starts at the base model's own answers
- **8-bit base**: works on quantized weights, with the answers of the dequantized base
- **gradient checkpointing**, **compile**: the gradients of the plain pass, in one compiled graph
- **several**: two adaptations on one base, each answering as if it were alone
"""


def read(name: str) -> dict[str, Any]:
    """A result file, or nothing where it was not written yet."""
    file = RESULTS / name
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def catalog() -> list[Method]:
    """Tunewise's own methods by area and name."""
    found = [get_method(name) for name in method_names()]
    return sorted((m for m in found if m.area != "yours"), key=lambda m: (m.area, m.name))


def accepted(checks: dict[str, Any]) -> set[str]:
    """The models that take the method: its count was not refused, which nothing but attaching can refuse."""
    bases = {base for found in checks.values() for base in found}
    return {b for b in bases if checks.get(COUNTED, {}).get(b, {}).get("result") != "refused"}


def able(checks: dict[str, Any], check: str) -> str:
    """What the suite found, over the models that take the method at all."""
    if not checks:
        return ""
    if check not in checks:  # the start is checked only where the method promises it, and counts always
        return "no" if check == CAPABILITIES["base at step 0"] and COUNTED in checks else ""
    there = accepted(checks)
    found = {base: entry for base, entry in checks[check].items() if base in there}
    results = {entry["result"] for entry in found.values()}
    if not results or "failed" in results:
        return "failed" if results else ""
    if "inexact" in results:
        return "off by " + max(e["said"] for e in found.values() if e["result"] == "inexact")
    if results == {"passed", "refused"}:
        return "on " + ", ".join(b for b, e in found.items() if e["result"] == "passed")
    return "yes" if results == {"passed"} else "no"


def measured(name: str, trained: dict[str, Any]) -> list[str]:
    """Validation loss, accuracy, time of a step (LoRA's is 1); nothing where the method was not tried."""
    one, lora = (trained.get("methods", {}).get(n) or {} for n in (name, "lora"))
    if one.get("loss") is None:
        return ["failed" if one else "", "", ""]
    whole = lora.get("loss") is not None
    pace = f"{one['seconds_per_step'] / lora['seconds_per_step']:.2f}" if whole else ""
    return [f"{one['loss']:.3f}", f"{one['accuracy']:.3f}", pace]


def escaped(text: str) -> str:
    """As a cell of a table."""
    return text.replace("|", "\\|")


def code(text: str) -> str:
    return f"`{escaped(text)}`" if text else ""


def options(method: Method) -> str:
    found = method.signature.parameters.items()
    return ", ".join(n if p.default is p.empty else f"{n}={p.default!r}" for n, p in found)


def sources(method: Method) -> str:
    given = method.facts.get("arxiv") or ()
    numbers = [given] if isinstance(given, str) else given
    return ", ".join(f"[{n}](https://arxiv.org/abs/{n})" for n in numbers)


def row(method: Method, checks: dict[str, Any], trained: list[dict[str, Any]]) -> list[str]:
    figures = [cell for found in trained for cell in measured(method.name, found)]
    waiting = {PROBE}.union(*(found.get("unfinished", ()) for found in trained))
    if any(trained) and not any(figures) and method.name not in waiting:
        figures[0] = "random models only"
    return [
        method.area,
        f"**{method.name}**: {escaped(method.facts.get('title', method.name))}",
        code(method.formula),
        sources(method),
        code(f'tunewise tune MODEL DATA --method "{method.name}"'),
        *(able(checks, check) for check in CAPABILITIES.values()),
        *figures,
        code(options(method)),
        escaped(method.facts.get("unverified", "")),
    ]


def table(heads: list[str], rows: Iterable[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def training(trained: list[dict[str, Any]]) -> list[str]:
    """What the measured columns mean."""
    there = [found for found in trained if found]
    if not there:
        return []
    lines = [
        "*loss*, *accuracy* and *step* were measured by `benchmarks/deltas.py`: validation rows, mean over the seeds "
        "at the best of three rates. *step* is CPU time, LoRA's is 1.",
        "",
    ]
    for found in there:
        probe, where = found["probe"], " (on images)" if found is trained[1] else ""
        lines.append(
            f"- {found['model']} on {found['data']}{where}: {found['steps']} steps, {len(found['seeds'])} seeds; the "
            f"linear probe has {probe['loss']:.3f} and {probe['accuracy']:.3f}{otherwise(found)}"
        )
    unreal = "*random models only*: checked on models with random weights, not trained on real data here."
    return [*lines, f"- {unreal}", ""]


def otherwise(found: dict[str, Any]) -> str:
    """The methods that were trained longer, or not as their name alone says."""
    groups: dict[int, list[str]] = {}
    for one in found["methods"].values():
        groups.setdefault(one.get("steps", found["steps"]), []).append(one.get("recipe", ""))
    said = [f"; {n} steps: {code(', '.join(r))}" for n, r in groups.items() if n != found["steps"]]
    spelled = [one["recipe"] for name, one in found["methods"].items() if one.get("recipe", name) != name]
    others = [recipe for recipe in spelled if not any(recipe in text for text in said)]
    return "".join([*said, f"; spelled {code(', '.join(others))}" if others else ""])


def refusals(capabilities: dict[str, Any], names: list[str]) -> list[str]:
    """Each sentence by which something was refused, with the methods that say it."""
    lines: list[str] = []
    for head, check in CAPABILITIES.items():
        said: dict[str, list[str]] = {}
        for name in names:
            checks = capabilities.get(name, {})
            there = accepted(checks)
            for base, entry in checks.get(check, {}).items():
                if base in there and entry["result"] == "refused":
                    said.setdefault(entry["said"], []).append(name)
        if said:
            lines += ["", f"**{head}**", ""]
            lines += [f"- {', '.join(dict.fromkeys(who))}: {text}" for text, who in sorted(said.items())]
    for name in names:
        checks = capabilities.get(name, {})
        for base in sorted({b for bases in checks.values() for b in bases} - accepted(checks)):
            text = checks[COUNTED][base]["said"]
            lines += ["", f"**{name}** is not taken by the {base} of the suite: {text}"]
    return ["", "## What is refused, in words", *lines] if lines else []


def render() -> str:
    """The whole page."""
    capabilities, trained = read("capabilities.json"), [read("deltas.json"), read("vision.json")]
    found = catalog()
    heads = ["area", "method", "equation", "arXiv", "use", *CAPABILITIES]
    heads += ["loss", "accuracy", "step", "image loss", "image accuracy", "image step"]
    heads += ["options and defaults", "our own reading"]
    rows = [row(m, capabilities.get(m.name, {}), trained) for m in found]
    lines = [INTRODUCTION, *training(trained), f"{len(found)} methods:", "", *table(heads, rows)]
    return "\n".join([*lines, *refusals(capabilities, [m.name for m in found])]) + "\n"


if __name__ == "__main__":
    write_text(ROOT / "docs" / "atlas.md", render())
