"""Contract 14: everything that learns is in the checkpoint, which is written whole or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

import tunewise.core.checkpoint as checkpoint
from tunewise.core.checkpoint import get_rng, latest, load_tree, save_tree, set_rng, write_json
from tunewise.core.errors import RunError, UserError
from tunewise.core.part import Part
from tunewise.core.recipe import Recipe
from tunewise.core.run import Run
from tunewise.delta.lora import LoRA

from .toys import Stopped, complete, interrupted, run_of, same_state, start, stop_at


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return (
            isinstance(b, Tensor)
            and a.dtype == b.dtype
            and a.shape == b.shape
            and torch.equal(a.nan_to_num(), b.nan_to_num())
        )
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


TREE: dict[str, Any] = {
    "numbers": [1, 2.5, -0.0, 1e-320, float("nan"), float("inf"), -float("inf"), 2**70, True, None],
    "text": {"": "ü\n~", "~": "tensor"},
    "tuple": (1, (2.0, "x"), []),
    "set": {"b", "a"},
    "empty": {},
    "int keys": {3: "c", 1: "a"},
    "tuple keys": {(0, "a"): 1},
    "none key": {None: 0},
    "tensors": {
        str(d): torch.tensor([0.5, -1.0]).to(d)
        for d in (
            torch.float32,
            torch.float64,
            torch.float16,
            torch.bfloat16,
            torch.int64,
            torch.int8,
            torch.uint8,
            torch.bool,
        )
    },
    "odd tensors": [
        torch.tensor(3.0),
        torch.empty(0, 4),
        torch.arange(6.0).view(2, 3).T,
        torch.tensor([float("nan")]),
    ],
}


def test_a_tree_comes_back_as_it_was(tmp_path: Path) -> None:
    save_tree(tmp_path / "step-1", TREE)
    assert same(TREE, load_tree(tmp_path / "step-1"))
    assert sorted(p.name for p in (tmp_path / "step-1").iterdir()) == ["state.json", "tensors.safetensors"]


def test_shared_memory_is_saved_as_values(tmp_path: Path) -> None:
    base = torch.arange(4.0)
    save_tree(tmp_path / "s", {"a": base, "b": base[:2], "c": base})
    assert same(load_tree(tmp_path / "s"), {"a": base, "b": base[:2], "c": base})


def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"The state state.parts.x holds a Generator"):
        save_tree(tmp_path / "s", {"parts": {"x": torch.Generator()}})
    assert not list(tmp_path.iterdir())


def test_damaged_folders_and_other_formats_are_refused(tmp_path: Path) -> None:
    for name in ("tensors.safetensors", "state.json"):
        save_tree(tmp_path / "s", {"a": torch.ones(3)})
        (tmp_path / "s" / name).write_bytes((tmp_path / "s" / name).read_bytes()[:-9])
        with pytest.raises(UserError, match="is no readable checkpoint"):
            load_tree(tmp_path / "s")
    save_tree(tmp_path / "s", {})
    plain = json.loads((tmp_path / "s" / "state.json").read_text())
    (tmp_path / "s" / "state.json").write_text(json.dumps(plain | {"format": 99}))
    with pytest.raises(UserError, match="has checkpoint format 99; this version reads 1"):
        load_tree(tmp_path / "s")


@pytest.mark.parametrize("call", [0, 1])
def test_a_kill_while_a_folder_is_replaced_never_leaves_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    save_tree(tmp_path / "s", {"a": 1})
    calls, replace = [], os.replace

    def killed(*args: Any) -> None:
        calls.append(args)
        if len(calls) > call:
            raise KeyboardInterrupt
        replace(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        save_tree(tmp_path / "s", {"a": 2})
    if (tmp_path / "s").exists():
        assert load_tree(tmp_path / "s") == {"a": 1}
    save_tree(tmp_path / "s", {"a": 3})
    assert load_tree(tmp_path / "s") == {"a": 3}


WRITER = """
import sys, torch
from pathlib import Path
from tunewise.core.checkpoint import save_tree
print("ready", flush=True)
for step in range(1, 10_000):
    save_tree(Path(sys.argv[1]) / f"step-{step:07d}", {"step": step, "a": torch.full((400_000,), float(step))})
"""


def test_sigkill_while_writing_leaves_the_old_one(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline()
    deadline, part = time.monotonic() + 30, []
    while time.monotonic() < deadline and not (part and latest(tmp_path)):
        part = list(tmp_path.glob(".step-*.part"))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    newest = latest(tmp_path)
    assert newest is not None
    tree = load_tree(newest)
    assert newest.name == f"step-{tree['step']:07d}" and bool((tree["a"] == tree["step"]).all())


def test_latest_counts_and_ignores_parts(tmp_path: Path) -> None:
    assert latest(tmp_path / "none") is None
    for name in ("step-9", "step-10", ".step-11.part"):
        (tmp_path / name).mkdir()
    assert latest(tmp_path) == tmp_path / "step-10"


def test_a_full_disk_ends_the_run_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, save = run_of("lora(rank=2)", tmp_path, checkpoint_every=1), checkpoint.save_file

    def full(*args: Any, **options: Any) -> None:
        if run.step == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(*args, **options)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(
        RunError, match="step-0000004 cannot be written: No space left on device; the last good"
    ):
        start(run)
    newest = latest(tmp_path / "checkpoints")
    assert newest is not None and load_tree(newest)["run"]["step"] == 3
    assert not list((tmp_path / "checkpoints").glob(".*"))
    monkeypatch.undo()
    assert same_state(start(run_of("lora(rank=2)", tmp_path)), start(run_of("lora(rank=2)")))


def test_a_real_write_error_is_a_run_error(tmp_path: Path) -> None:
    code = (
        "import resource, torch; from pathlib import Path; from tunewise.core.checkpoint import save_tree\n"
        "from tunewise.core.errors import RunError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        f"try: save_tree(Path({str(tmp_path / 's')!r}), {{'a': torch.ones(10_000)}})\n"
        "except RunError as error: print(error)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "cannot be written" in found.stdout, found.stderr
    assert not list(tmp_path.iterdir())


class Poison(Part):
    """A loss that becomes NaN at step 4."""

    slot: ClassVar[str] = "objective"
    weight: float = 1.0

    def loss(self, run: Run, batch: Any, logits: Tensor, outputs: Any, units: float) -> Tensor:
        return logits.sum() * (float("nan") if run.step == 3 else 0.0)


def test_a_loss_that_becomes_nan_ends_the_run_with_the_last_good_state(tmp_path: Path) -> None:
    recipe = complete("lora(rank=2)")
    recipe.default["objective"].append(Poison())
    run = run_of(recipe, tmp_path, checkpoint_every=1)
    with pytest.raises(RunError, match="The loss became nan at step 4; a lower learning rate"):
        start(run)
    newest = latest(tmp_path / "checkpoints")
    assert newest is not None and load_tree(newest)["run"]["step"] == 3
    assert all(bool(torch.isfinite(v).all()) for v in run.handle.state().values())


class Noise(Part):
    """Draws from every global random state; may hold another part as an option."""

    slot: ClassVar[str] = "diagnose"
    inner: Part | None = None

    def after_step(self, run: Run) -> None:
        drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]
        self.state["seen"] = self.state.get("seen", []) + [drawn]


def test_random_states_and_nested_parts_are_in_the_checkpoint(tmp_path: Path) -> None:
    def make(name: str) -> Run:
        random.seed(5)
        np.random.seed(5)
        return run_of(Recipe(delta=LoRA(2), diagnose=Noise(Noise())), tmp_path / name, checkpoint_every=2)  # type: ignore[arg-type]

    whole, cut = start(make("whole")), interrupted(lambda: make("cut"), 5)
    parts: list[Any] = [r.recipe["diagnose"][0] for r in (whole, cut)]
    assert parts[0].state == parts[1].state and len(parts[0].state["seen"]) == 6
    assert parts[0].inner.state == parts[1].inner.state and len(parts[0].inner.state["seen"]) == 6
    assert same_state(whole, cut)


def test_rng_round_trip(tmp_path: Path) -> None:
    state = get_rng()
    first = [random.random(), float(np.random.randn()), float(torch.rand(()))]
    save_tree(tmp_path / "s", state)
    set_rng(load_tree(tmp_path / "s"))
    assert [random.random(), float(np.random.randn()), float(torch.rand(()))] == first


def test_old_checkpoints_and_remains_are_cleared(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        start(stop_at(run_of("lora(rank=2)", tmp_path, checkpoint_every=1), 5))
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["step-0000003", "step-0000004"]


def test_json_has_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": float("nan"), 1: [float("inf"), 2.0]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": None, "1": [None, 2.0]}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
