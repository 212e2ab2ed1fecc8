"""What can be done with a finished run: predict, evaluate, merge, export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunewise.core.errors import UserError
from tunewise.record import read_record

if TYPE_CHECKING:
    from torch import nn

    from tunewise.core.handle import Handle
    from tunewise.core.run import Run
    from tunewise.prepare import Prepared

__all__ = ["Result", "evaluate", "export_run", "merge_run", "predict"]


class Result:
    """A finished run in memory: `metrics` is flat ("accuracy" is on test rows, "valid/accuracy" on validation
    rows).
    """

    def __init__(
        self,
        *,
        metrics: dict[str, float] | None = None,
        prepared: Prepared | None = None,
        handle: Handle | None = None,
        directory: Path | None = None,
        run: Run | None = None,
        plan: dict[str, Any] | None = None,
    ) -> None:
        self.metrics, self.handle, self.directory = metrics or {}, handle, directory
        self.plan, self._prepared, self._run = plan, prepared, run

    @property
    def model(self) -> nn.Module:
        """The tuned model, the adaptation attached."""
        assert self._prepared is not None
        return self._prepared.model

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        assert self._prepared is not None
        return self._prepared.tokenizer

    def summary(self) -> dict[str, Any]:
        """JSON-ready: method, folder, metrics."""
        name = self.handle.recipe.name if self.handle is not None else None
        return {
            "method": name,
            "directory": str(self.directory) if self.directory else None,
            "metrics": self.metrics,
        }

    def predict(self, rows: Any, *, max_new_tokens: int = 256) -> list[dict[str, Any]]:
        """One dict per row: its id, the place of an image, the prediction (of language models the greedy answer)."""
        assert self._run is not None
        from tunewise.loop.evaluate import predict_rows
        from tunewise.task import CausalLM, generate

        data, task = _table(rows), self._run.task
        if isinstance(task, CausalLM):
            found: list[Any] = list(
                generate(self.model, self.tokenizer, data, task, max_new_tokens=max_new_tokens)
            )
        else:
            examples = task.encode(data, self.tokenizer, self._run.recipe.single("head"), labelled=False)
            found, _ = predict_rows(self._run, examples)
        return [
            {"id": row["id"], **_files(row), "prediction": value}
            for row, value in zip(data, found, strict=True)
        ]

    def evaluate(self, rows: Any) -> dict[str, float]:
        """The task's metrics on labelled rows."""
        assert self._run is not None
        from tunewise.loop.evaluate import evaluate as measure

        data = _table(rows)
        examples = self._run.task.encode(data, self.tokenizer, self._run.recipe.single("head"))
        return {**measure(self._run, examples), **self._generated(data)}

    def _generated(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """Scores of generated answers, when the metric asks for them (exact_match, a function of one's own)."""
        assert self._run is not None
        from tunewise.task import CausalLM, generate, generation_metrics

        task = self._run.task
        if not isinstance(task, CausalLM) or task.generation_metric is None:
            return {}
        return generation_metrics(task, generate(self.model, self.tokenizer, rows, task), rows)

    def measure_test(self, say: Any = None, stage: Any = None) -> dict[str, float]:
        """Measures the test rows, once, and adds their metrics under their own names."""
        from tunewise.loop.evaluate import evaluate as measure
        from tunewise.prepare import encode

        assert self._prepared is not None and self._run is not None
        encode(self._prepared, ("test",), say or (lambda sentence: None))
        examples = self._prepared.examples.get("test")
        if examples:
            tick = stage("test rows", len(examples)) if stage is not None else None
            self.metrics.update(measure(self._run, examples, tick))
            self.metrics.update(self._generated(self._prepared.data.splits.test))
        return self.metrics

    @classmethod
    def open(cls, directory: str | Path, prepared: Prepared | None = None, device: str = "auto") -> Result:
        """A finished run from its folder: base model loaded, adaptation restored."""
        from tunewise.backbone import load
        from tunewise.core.handle import restore
        from tunewise.core.run import Run
        from tunewise.loop.settings import Settings
        from tunewise.machine import pick_device
        from tunewise.prepare import Data, Prepared
        from tunewise.task import Task

        folder = Path(directory)
        facts = read_record(folder)
        if facts.get("status") != "done":
            raise UserError(f"{folder} is not finished: go on with it by tune --resume --out {folder}.")
        identity = facts["identity"]
        if prepared is None:
            base = identity["model"]
            if base.get("name") is None:
                raise UserError(
                    f"{folder} was tuned from a model object ({base['class']}): "
                    "load that, then tw.restore(model, folder)."
                )
            model, tokenizer = load(
                base["name"],
                auto=base["auto"],
                labels=base["labels"],
                regression=base["regression"],
                device=pick_device(device),
            )
            task = Task.from_description(identity["task"])
            data = Data(task, None, facts["data"]["name"], identity["data"])  # type: ignore[arg-type]
            prepared = Prepared(model, tokenizer, None, data, base)  # type: ignore[arg-type]
        handle = restore(prepared.model, folder / "adaptation")
        prepared.recipe = handle.recipe
        run = Run(
            handle,
            task=prepared.data.task,
            seed=identity["seed"],
            settings=Settings.of(**identity["settings"]),
        )
        run.tokenizer = prepared.tokenizer
        return cls(metrics=facts["metrics"], prepared=prepared, handle=handle, directory=folder, run=run)


def _table(rows: Any) -> list[dict[str, Any]]:
    from tunewise.data import read_rows

    return read_rows(rows).rows


def _files(row: dict[str, Any]) -> dict[str, str]:
    """Where the images of a row come from, as a hash tells nobody."""
    from tunewise.data.image import Picture

    return {name: value.where for name, value in row.items() if isinstance(value, Picture)}


def predict(run: str | Path, rows: Any, *, device: str = "auto") -> list[dict[str, Any]]:
    """Predictions of a finished run for a file, demo name, or rows."""
    return Result.open(run, device=device).predict(rows)


def evaluate(run: str | Path, data: Any = None, *, device: str = "auto") -> dict[str, float]:
    """Metrics of a finished run: those on its own test rows as they were measured, or on other data."""
    if data is None:
        facts = read_record(run)
        return dict(facts.get("metrics", {}))
    return Result.open(run, device=device).evaluate(data)


def merge_run(run: str | Path, out: str | Path) -> Path:
    """Writes the tuned model as a plain Hugging Face folder that loads without Tunewise."""
    export_run(run, "hf", out)
    return Path(out)


def export_run(run: str | Path, to: str, out: str | Path) -> dict[str, Any]:
    """Writes a finished run in another format: peft, lora, hf, tunewise; gives the facts kept in export.json."""
    from tunewise.interop.export import export

    folder = Path(out)
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: choose another --out.")
    result = Result.open(run, device="cpu")
    assert result.handle is not None
    return export(result.handle, to, folder, tokenizer=result.tokenizer)
