"""Events of parts inside transformers.Trainer and inside one's own loop: which, how often, in which order."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from tests.models import tiny, tiny_batch
from tunewise.core.errors import UserError
from tunewise.core.handle import Handle, attach
from tunewise.core.part import Part
from tunewise.core.recipe import Recipe
from tunewise.core.run import Run
from tunewise.delta.lora import LoRA


class Recorder(Part):
    """Writes down every event, and whether gradients were there."""

    slot: ClassVar[str] = "diagnose"

    def _note(self, event: str) -> None:
        self.state.setdefault("seen", []).append(event)

    def prepare(self, run: Run) -> None:
        self._note("prepare")

    def before_step(self, run: Run) -> None:
        self._note("before_step")

    def gradients(self, run: Run) -> None:
        first = next(i.tensor for _, i in run.tensors.active())
        assert first.grad is not None
        self.state.setdefault("norms", []).append(float(first.grad.norm()))
        self._note("gradients")

    def after_step(self, run: Run) -> None:
        self._note("after_step")

    def boundary(self, run: Run, kind: str) -> None:
        self._note(f"boundary {kind}")

    def finish(self, run: Run) -> None:
        self._note("finish")


STEP = ["gradients", "after_step", "before_step"]


def _recording(name: str = "bert") -> tuple[Any, Handle, Recorder]:
    model = tiny(name)
    handle = attach(model, Recipe(delta=LoRA(rank=2), diagnose=Recorder()))
    recorder = handle.recipe["diagnose"][0]
    assert isinstance(recorder, Recorder)
    return model, handle, recorder


def _rows(count: int) -> list[dict[str, torch.Tensor]]:
    batch = tiny_batch("bert", size=count)
    return [{k: v[i] for k, v in batch.items()} for i in range(count)]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trainer_fires_each_event_once_per_optimizer_step(accumulation: int, tmp_path: Path) -> None:
    import transformers

    model, handle, recorder = _recording()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        per_device_train_batch_size=2,
        num_train_epochs=2,
        gradient_accumulation_steps=accumulation,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    start = [p.detach().clone() for p in handle.parameters()]
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=_rows(8), callbacks=[handle.callback()]
    )  # type: ignore[arg-type]
    trainer.train()
    steps = 4 // accumulation
    epoch = STEP * steps + ["boundary epoch"]
    assert recorder.state["seen"] == ["prepare", "before_step", *epoch, *epoch, "finish"]
    assert handle.run is not None and handle.run.step == 2 * steps == trainer.state.global_step
    assert any(not torch.equal(a, b) for a, b in zip(start, handle.parameters(), strict=True))
    handle.save(tmp_path / "kept")


def test_accumulated_gradients_are_complete_when_the_part_sees_them(tmp_path: Path) -> None:
    """Two micro-batches of 2 give the gradients of one batch of 4 (of a model whose loss counts tokens)."""
    import transformers

    norms = []
    batch = tiny_batch("llama", size=4)
    rows = [{k: v[i] for k, v in batch.items()} for i in range(4)]
    for size, accumulation in ((4, 1), (2, 2)):
        model, handle, recorder = _recording("llama")
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / "trainer"),
            per_device_train_batch_size=size,
            max_steps=1,
            gradient_accumulation_steps=accumulation,
            report_to=[],
            save_strategy="no",
            max_grad_norm=0.0,
            logging_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        with torch.no_grad():
            for p in handle.parameters():
                p.copy_(torch.linspace(-0.1, 0.1, p.numel()).view_as(p))
        trainer = transformers.Trainer(
            model=model, args=arguments, train_dataset=rows, callbacks=[handle.callback()]
        )  # type: ignore[arg-type]
        trainer.train()
        norms.append(recorder.state["norms"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4) and norms[0][0] > 0


def test_ones_own_loop_fires_the_events_through_the_optimizer(tmp_path: Path) -> None:
    model, handle, recorder = _recording("llama")
    optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-2)
    run = handle.watch(optimizer)
    losses = []
    for _ in range(3):
        for seed in (0, 1):
            loss = model(**tiny_batch("llama", seed=seed)).loss
            (loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert recorder.state["seen"] == ["prepare", "before_step", *STEP * 3]
    assert run.step == 3 and losses[-1] < losses[0]
    assert run.tensors.optimizer is optimizer
    handle.save(tmp_path)


def test_an_event_that_never_came_is_an_error_at_save(tmp_path: Path) -> None:
    model, handle, _ = _recording()
    optimizer = torch.optim.AdamW(handle.parameters())
    handle.watch(optimizer)
    with pytest.raises(UserError, match="Recorder needs the event gradients and never got it"):
        handle.save(tmp_path / "watched")
    assert not (tmp_path / "watched" / "adaptation.safetensors").exists()
    model(**tiny_batch("bert")).loss.backward()
    optimizer.step()
    handle.save(tmp_path / "stepped")


def test_a_recipe_without_events_needs_no_watching(tmp_path: Path) -> None:
    attach(tiny("bert"), "lora(rank=2)").save(tmp_path)


def test_watching_finds_a_site_that_the_forward_pass_never_calls() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.dead = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)  # type: ignore[no-any-return]

    model = Odd()
    handle = attach(model, LoRA(rank=2, sites="all"))
    optimizer = torch.optim.AdamW(handle.parameters())
    handle.watch(optimizer)
    model(torch.ones(1, 4)).sum().backward()
    with pytest.raises(UserError, match="dead owns a LoRA and was not called"):
        optimizer.step()
