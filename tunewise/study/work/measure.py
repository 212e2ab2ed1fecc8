"""The jobs that read the test rows, once: finished trials and baselines, row by row.

Without test rows they read the validation rows, which is said in the study's notes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunewise.core.errors import UserError
from tunewise.study.baselines.measured import PROMPTED, can, expected_seconds, measure_baseline
from tunewise.study.baselines.measured import Base as BaseModel
from tunewise.study.work.commons import Base, objects, open_base, read_brief, task_of
from tunewise.study.work.memory import warm_up, weights_of
from tunewise.study.work.trial import finished, shared_features

__all__ = ["baseline", "baseline_seconds", "finalist", "row_table"]


GENERAL, LARGE = 256, 200 * 2**20
"""Texts that show what is forgotten; a quarter of them for base models beyond so many bytes."""


def finalist(study: str, method: str, seed: int, directory: str, timed: bool = True) -> dict[str, Any]:
    """Test metrics and forgetting of a finished trial, and if `timed` seconds per 1,000 rows, which no seed changes;
    rows go to `test.parquet`.
    """
    from tunewise.diagnose.inference import inference_cost
    from tunewise.loop.evaluate import predict_rows

    with finished(study, method, seed, directory) as (run, prepared, base):
        task, which = prepared.data.task, "test" if prepared.data.splits.test else "valid"
        rows, examples = prepared.data.splits[which], prepared.examples[which]
        with shared_features(study, run):
            predictions, losses = predict_rows(run, examples)
        metrics: dict[str, Any] = {**losses, **task.metrics(predictions, examples)}
        answers = _answers(run, task, rows, metrics)
        row_table(Path(study) / directory / "test.parquet", task, rows, predictions, answers)
        metrics |= inference_cost(run, examples) if timed else {}
        reference = _reference(study, base)
        metrics |= reference.measure(run.handle)
        notes = [reference.reason] if reference.reason else []
    return {"metrics": metrics, "notes": notes}


def _asked(study: str) -> BaseModel:
    """The worker's base model as baselines ask it."""
    from tunewise.backbone import backbone_config

    facts, _ = read_brief(study)
    held = objects.get(study)
    own = held.model if held is not None else None

    def load(auto: str) -> tuple[Any, Any]:
        base = open_base(study, auto)
        return base.model, base.tokenizer

    return BaseModel(load, backbone_config(facts["model"]) if own is None else getattr(own, "config", None))


def baseline_seconds(study: str, name: str) -> dict[str, Any]:
    """{"seconds": what measuring this baseline will take} or {"reason": why the base model cannot}."""
    facts, splits = read_brief(study)
    warm_up(study)
    asked, task = _asked(study), task_of(study, facts)
    tokenizer = open_base(study, "base").tokenizer if name in PROMPTED else None
    reason = can(name, asked.config, tokenizer, task)
    if reason is not None:
        return {"reason": reason}
    return {"seconds": expected_seconds(name, task, splits.train, splits.test or splits.valid, asked)}


def baseline(study: str, name: str, directory: str) -> dict[str, Any]:
    """A baseline on the test rows; {"metrics", "notes"}."""
    facts, splits = read_brief(study)
    task, rows = task_of(study, facts), splits.test or splits.valid
    found = measure_baseline(name, task, splits.train, rows, _asked(study))
    row_table(Path(study) / directory / "test.parquet", task, rows, found.predictions, found.answers)
    return {"metrics": {"kind": "baseline", **found.costs, **found.metrics}, "notes": found.notes}


def _answers(run: Any, task: Any, rows: list[Any], metrics: dict[str, Any]) -> list[str] | None:
    """Generated texts, where the metric asks for them; their scores are added."""
    from tunewise.task import CausalLM, generate, generation_metrics

    if not isinstance(task, CausalLM) or task.generation_metric is None:
        return None
    texts = generate(run.model, run.tokenizer, rows, task)
    metrics |= generation_metrics(task, texts, rows)
    return texts


def _reference(study: str, base: Base) -> Any:
    """The frozen base on general text, once per base; what cannot be measured says why."""
    from tunewise.diagnose.forgetting import General, base_side

    if "general" not in base.notes:
        facts, _ = read_brief(study)
        rows = GENERAL if weights_of(base) < LARGE else GENERAL // 4
        try:
            base.notes["general"] = base_side(
                base.model,
                base.tokenizer,
                name=facts["model"],
                study=facts["data"],
                general=facts["general"],
                rows=rows,
            )
        except UserError as error:  # about the general texts: no reason to lose the test rows
            base.notes["general"] = General(reason=f"Forgetting is not measured: {error}")
    return base.notes["general"]


def row_table(
    path: Path, task: Any, rows: list[Any], predictions: list[Any], answers: list[str] | None = None
) -> None:
    """One line per test row: id, what is right, what was predicted; written whole."""
    import pandas as pd

    from tunewise.study.tables import write_parquet
    from tunewise.task import CausalLM
    from tunewise.task.metrics import exact_match

    table = pd.DataFrame({"id": [str(row["id"]) for row in rows]})
    if isinstance(task, CausalLM):
        for key in ("loss", "token_accuracy", "tokens"):
            table[key] = [float(p[key]) for p in predictions]
        if answers is not None:
            table["answer"] = answers
            pairs = zip(answers, task.references(rows), strict=True)
            table["right"] = [exact_match([a], [r]) for a, r in pairs]
    else:
        labels = getattr(task, "labels", None)
        truth = [task.label_of(row) if labels else float(row[task.columns.label]) for row in rows]
        table["reference"] = [labels[i] for i in truth] if labels else truth
        table["prediction"] = predictions if labels else [float(p) for p in predictions]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_parquet(table, path)
