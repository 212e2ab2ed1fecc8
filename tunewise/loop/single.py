"""One stage: steps over the training rows, looks at the validation rows, checkpoints, the best state kept."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import torch

from tunewise.core.checkpoint import latest, load_tree, save_tree
from tunewise.core.errors import RunError
from tunewise.core.part import Part
from tunewise.core.run import Run
from tunewise.delta.half_attention import half_attention
from tunewise.delta.lean import lean_layers

from .checkpointing import checkpoint_activations
from .evaluate import evaluate

__all__ = ["Single"]


class Single(Part):
    """for each step: rows -> micro-batches -> sum of losses / units of the step -> gradients -> optimizer ->
    events.

    Resumes from the newest checkpoint in the run's directory, bit-equal to a run that was never stopped; a run
    that is done goes on where `settings` now ask for more steps. A loss that is not finite ends the run with
    `RunError`; the last good state stays on disk.
    """

    slot: ClassVar[str] = "loop"

    def run(self, run: Run) -> None:
        """Trains until the steps are done or patience ends."""
        settings, optimizer = run.settings, run.recipe.single("optimizer")
        stream = run.batches("train", settings.batch_size)
        total = run.total_steps = settings.steps or max(1, round(settings.epochs * len(stream)))
        optimizer.setup(run, optimizer.lr or settings.lr)  # type: ignore[union-attr]
        accelerator = _accelerator(run)
        run.loss_scale = 1024.0 if settings.dtype == "float16" else 1.0
        self._prepare(run, optimizer)
        run.total_steps = total  # more than when the checkpoint was written, where a run is made longer
        every = max(1, math.ceil(run.total_steps / settings.evaluations)) if settings.evaluations else 0
        with lean_layers(run), half_attention(run):
            while run.step < run.total_steps and not run.extra.get("stopped"):
                self._one_step(run, optimizer, stream, accelerator)
                look = bool(every) and (run.step % every == 0 or run.step == run.total_steps)
                if look and "valid" in run.streams.data:
                    self._look(run)
                keep = run.step % settings.checkpoint_every == 0 if settings.checkpoint_every else look
                if run.directory is not None and (keep or run.step == run.total_steps):
                    self._checkpoint(run, optimizer)
        self._end(run)

    def _prepare(self, run: Run, optimizer: Any) -> None:
        newest = latest(run.directory / "checkpoints") if run.directory else None
        if newest is None:
            if "moments" in run.extra:
                optimizer.load_state_dict(run, run.extra.pop("moments"))
            run.fire("prepare")
            return
        state = load_tree(newest)
        run.load_state_dict(state["run"])
        optimizer.setup(run, optimizer.lr or run.settings.lr)
        optimizer.load_state_dict(run, state["optimizer"])
        run.log(resumed=run.step)

    def _one_step(self, run: Run, optimizer: Any, stream: Any, accelerator: Any) -> None:
        settings = run.settings
        run.model.train()
        run.handle.frozen_eval()
        rows = {e["id"]: e for e in next(stream)}
        rows = {i: rows[i] for i in run.fire("select", list(rows))}
        if not rows:
            raise RunError(
                f"No row was left at step {run.step + 1}: a data selector refused the whole batch."
            )
        size, chosen = settings.micro_batch or len(rows), list(rows.values())
        micro = [run.collate(chosen[i : i + size]) for i in range(0, len(chosen), size)]
        run.fire("before_step")
        factor = settings.factor(run.step, run.total_steps)

        def backward(batch: Any, units: float) -> float:
            with _autocast(run):
                loss = run.loss(batch, units)
            accelerator.backward(loss * run.loss_scale)
            return float(loss.detach())

        loss = optimizer.step(run, micro, factor, backward)
        if run.step == 0:
            run.handle.check_called()
        run.step += 1
        run.fire("after_step")
        group = (
            run.tensors.optimizer.param_groups[0] if run.tensors.optimizer else {"lr": settings.lr * factor}
        )
        tokens = sum(int(b.inputs["attention_mask"].sum()) for b in micro if "attention_mask" in b.inputs)
        run.log(loss=loss, lr=group["lr"], tokens=tokens, **run.metrics)
        if stream.at_epoch_end:
            run.epoch += 1
            run.fire("boundary", "epoch")

    def _look(self, run: Run) -> None:
        found = evaluate(run, run.streams.data["valid"][: run.settings.valid_rows])
        score = found[run.task.metric]
        better = score if run.task.higher_is_better else -score
        run.log(**{f"valid/{k}": v for k, v in found.items()})
        if "best" not in run.extra or better > run.extra["best"]:
            run.extra |= {"best": better, "best_step": run.step, "since": 0}
            run.extra["best_state"] = {k: v.clone() for k, v in run.handle.state().items()}
        else:
            run.extra["since"] += 1
            run.extra["stopped"] = bool(run.settings.patience) and run.extra["since"] >= run.settings.patience

    def _checkpoint(self, run: Run, optimizer: Any) -> None:
        assert run.directory is not None
        folder = run.directory / "checkpoints"
        save_tree(
            folder / f"step-{run.step:07d}", {"run": run.state_dict(), "optimizer": optimizer.state_dict(run)}
        )
        _thin(folder)

    def _end(self, run: Run) -> None:
        run.fire("boundary", "stage")
        run.fire("finish")
        if "best_state" in run.extra:
            run.handle.load_state(run.extra["best_state"])


def _thin(folder: Path, keep: int = 2) -> None:
    import shutil

    old = sorted(folder.glob("step-*"))[:-keep]
    for path in old:
        shutil.rmtree(path)
    for path in folder.glob(".step-*"):
        shutil.rmtree(path)


def _autocast(run: Run) -> Any:
    """Ours, because accelerate's is one for the whole process and a comparison mixes precisions."""
    dtype = getattr(torch, run.settings.dtype)
    return torch.autocast(run.device.type, dtype, enabled=dtype is not torch.float32)


def _accelerator(run: Run) -> Any:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=run.device.type == "cpu")
    if accelerator.num_processes > 1:
        raise RunError(
            "This loop trains in one process; start it without accelerate's multi-process launcher."
        )
    checkpoint_activations(run)
    return accelerator
