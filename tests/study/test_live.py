"""What is seen of a study while it runs, in a terminal of any width and where there is none."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from tunewise.study.budget import Clock
from tunewise.study.live import Live
from tunewise.study.schedule import MEASURE, fixed_list
from tunewise.study.store import Store, Trial

METHODS = ["lora", "series_adapter(size=32, sites='attention | mlp')", "full"]


class Running:
    """A study with three methods of three rates each, 12:31 of whose 30 minutes are over."""

    def __init__(self, folder: Path, **facts: Any) -> None:
        self.store = Store.open(folder, {})
        known = {"metric": "accuracy", "higher_is_better": True, "methods": METHODS}
        self.store.set("facts", {**known, **facts})
        rates = (1e-3, 1e-4, 3e-5)
        self.schedule = fixed_list([{"method": m, "lr": r, "steps": 189} for m in METHODS for r in rates])
        clock = Clock(1800.0, before=751.0, now=lambda: 0.0)
        self.conductor = SimpleNamespace(clock=clock, schedule=self.schedule)

    def begun(self, method: str, rate: float | None, **more: Any) -> Trial:
        steps = more.pop("steps", 0 if rate is None else 189)
        return self.store.start(self.store.add(method, rate, steps=steps, **more).id)

    def done(self, method: str, rate: float | None, metrics: dict[str, Any], **more: Any) -> Trial:
        return self.store.finish(self.begun(method, rate, **more).id, metrics)

    def live(self, *, terminal: bool = True, width: int = 80, height: int = 40, on: bool = True) -> Live:
        self.out = io.StringIO()
        console = Console(
            file=self.out, force_terminal=terminal, width=width, height=height, color_system=None
        )
        return Live(self.store, self.conductor, on, console)

    def seen(self, live: Live) -> list[str]:
        self.out.seek(0)
        self.out.truncate()
        live.console.print(live.view())
        return self.out.getvalue().splitlines()


@pytest.fixture
def study(tmp_path: Path) -> Any:
    made = Running(tmp_path / "study")
    yield made
    made.store.close()


def line(seen: list[str], method: str) -> str:
    (found,) = [text for text in seen if text.startswith(method)]
    return " ".join(found.split())


def score(value: float) -> dict[str, float]:
    return {"score": value, "valid/accuracy": value}


def test_a_trial_from_begin_to_end(study: Running) -> None:
    live = study.live(width=120)
    assert line(study.seen(live), "full") == "full 0/3 waiting"
    row = study.begun("lora", 1e-3)
    live.watch("begin", {"trial": row})
    assert line(study.seen(live), "lora") == "lora 0/3 lr 0.001, to step 189"
    live.watch("step", {"trial": row, "step": 40, "steps": 189})
    assert line(study.seen(live), "lora") == "lora 0/3 40 lr 0.001, step 40/189"
    live.watch("end", {"trial": study.store.finish(row.id, score(0.8124))})
    assert line(study.seen(live), "lora") == "lora 1/3 0.812 0.001 189"
    # A sign of life that comes in late does not bring the trial back.
    live.watch("step", {"trial": row, "step": 189, "steps": 189})
    assert line(study.seen(live), "lora") == "lora 1/3 0.812 0.001 189"


def test_best_of_several_and_a_measured_one(study: Running) -> None:
    for rate, value in ((1e-3, 0.7), (1e-4, 0.8), (3e-5, float("nan"))):
        study.done("lora", rate, score(value))
    live = study.live(width=120)
    assert line(study.seen(live), "lora") == "lora 3/3 0.800 0.0001 189"
    for seed, value in ((0, 0.82), (1, 0.83)):
        row = study.begun("lora", 1e-4, rung=MEASURE, seed=seed)
        live.watch("begin", {"trial": row})
        assert f"measuring{' seed 1' * seed}" in study.seen(live)[2]
        live.watch("end", {"trial": study.store.finish(row.id, {"accuracy": value})})
    seen = study.seen(live)
    assert line(seen, "lora").endswith(" measured 0.825 (2 seeds)")
    assert seen[-1].startswith("measuring ━") and seen[-1].endswith("12:31 of 30:00, 17:29 left")


def test_lower_is_better(tmp_path: Path) -> None:
    study = Running(tmp_path, metric="mae", higher_is_better=False)
    for rate, value in ((1e-3, 0.7), (1e-4, 0.8)):
        study.done("lora", rate, {"score": value, "valid/mae": value})
    assert line(study.seen(study.live()), "lora") == "lora 2/3 0.700 0.001 189"
    study.store.close()


def test_the_loss_stands_in_for_generated_answers(tmp_path: Path) -> None:
    study = Running(tmp_path, metric="exact_match")
    for rate, value in ((1e-3, 2.5), (1e-4, 1.5)):
        study.done("lora", rate, {"score": value, "valid/loss": value})
    live = study.live(terminal=False)
    assert line(study.seen(live), "lora") == "lora 2/3 1.500 0.0001 189"
    with live:
        live.watch("end", {"trial": study.store.trial(1)})
    assert "lora lr=0.001 seed 0: loss 2.500 after 189 steps" in study.out.getvalue()
    study.store.close()


def test_failures_and_waiting(study: Running) -> None:
    live = study.live(width=140)
    one = study.begun("lora", 1e-3)
    live.watch("begin", {"trial": one})
    live.watch("end", {"trial": study.store.requeue(one.id, "out of memory; it goes on with 8 rows")})
    assert line(study.seen(live), "lora") == "lora 0/3 waits: out of memory; it goes on with 8 rows"
    live.watch("begin", {"trial": study.store.start(one.id)})
    live.watch("end", {"trial": study.store.fail(one.id, "The loss was NaN\nat step 3.")})
    assert line(study.seen(live), "lora") == "lora 0/3 failed: The loss was NaN at step 3"
    live.watch("end", {"trial": study.done("lora", 1e-4, score(0.8))})
    told = "lora 1/3 0.800 0.0001 189 1 failed: The loss was NaN at step 3"
    assert line(study.seen(live), "lora") == told


def test_a_study_that_goes_on_shows_what_was_done(study: Running) -> None:
    study.done("lora", 1e-3, score(0.8))
    study.done("tfidf", None, {"accuracy": 0.75}, rung=MEASURE)
    seen = study.seen(study.live(width=120))
    assert line(seen, "lora") == "lora 1/3 0.800 0.001 189"
    assert line(seen, "tfidf") == "tfidf measured 0.750"


@pytest.mark.parametrize("width", [20, 40, 63, 64, 80, 200])
def test_every_line_stays_one_line(study: Running, width: int) -> None:
    study.done("lora", 1e-3, score(0.8))
    live = study.live(width=width)
    for rate in (1e-3, 1e-4):
        live.watch("begin", {"trial": study.begun(METHODS[1], rate)})
    row = study.begun("full", 1e-3)
    live.watch("end", {"trial": study.store.fail(row.id, "Out of memory: " + "much " * 50)})
    seen = study.seen(live)
    assert len(seen) == 2 + len(METHODS) + 1
    assert max(map(len, seen)) <= width
    assert "0.800" in seen[2]


def test_a_low_terminal_shows_what_runs(study: Running) -> None:
    live = study.live(height=12)
    for place in range(40):
        live.watch("end", {"trial": study.done(f"method_{place}", 1e-3, score(0.5), steps=place)})
    live.watch("begin", {"trial": study.begun("method_7", 1e-4)})
    seen = study.seen(live)
    assert len(seen) < 12
    assert any(text.startswith("method_7") for text in seen)
    assert "and 37 more" in seen[-2]


def test_brackets_are_no_markup(study: Running) -> None:
    live = study.live(width=120, terminal=False)
    row = study.begun("lora(sites=['query'])", 1e-3)
    with live:
        live.watch("end", {"trial": study.store.fail(row.id, "no [/bold] site")})
    said = "[12:31 of 30:00] lora(sites=['query']) lr=0.001 seed 0: failed: no [/bold] site\n"
    assert study.out.getvalue() == said
    assert any("lora(sites=['query'])" in text for text in study.seen(live))


def test_without_a_terminal_a_line_per_trial(study: Running) -> None:
    with study.live(terminal=False, width=40) as live:
        row = study.begun("lora", 1e-3, steps=63)
        live.watch("begin", {"trial": row})
        live.watch("step", {"trial": row, "step": 40, "steps": 63})
        live.watch("tick", {"spent": 751.0})
        assert study.out.getvalue() == ""
        live.watch("end", {"trial": study.store.finish(row.id, score(0.812))})
        live.watch("end", {"trial": study.done("tfidf", None, {"accuracy": 0.75}, rung=MEASURE)})
    assert study.out.getvalue().splitlines() == [
        "[12:31 of 30:00] lora lr=0.001 seed 0: accuracy 0.812 after 63 steps",
        "[12:31 of 30:00] tfidf: measured, accuracy 0.750",
    ]


def test_off_prints_nothing(study: Running, capsys: pytest.CaptureFixture[str]) -> None:
    with study.live(on=False) as live:
        live.watch("begin", {"trial": study.begun("lora", 1e-3)})
        live.watch("end", {"trial": study.store.trial(1)})
    assert study.out.getvalue() == "" and capsys.readouterr() == ("", "")


def test_the_last_state_stays_on_the_screen(study: Running) -> None:
    with pytest.raises(KeyboardInterrupt), study.live(height=6) as live:
        live.watch("begin", {"trial": study.begun("lora", 1e-3)})
        raise KeyboardInterrupt
    last = study.out.getvalue().splitlines()[-7:]
    assert [name for name in ("lora", "series", "full") if any(name in text for text in last)] == [
        "lora",
        "series",
        "full",
    ]
    assert any("lora" in text and text.rstrip().endswith(" stopped") for text in last)
    assert any(text.strip().startswith("stopped ━") for text in last)


def test_steps_from_many_threads_cost_no_query(study: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    live = study.live()
    rows = [study.begun("lora", rate) for rate in (1e-3, 1e-4, 3e-5)]
    for row in rows:
        live.watch("begin", {"trial": row})
    monkeypatch.setattr(Store, "_rows", lambda *_: pytest.fail("a query"))
    errors: list[BaseException] = []

    def steps(row: Trial) -> None:
        try:
            for step in range(1, 190):
                live.watch("step", {"trial": row, "step": step, "steps": 189})
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=steps, args=(row,)) for row in rows]
    for thread in threads:
        thread.start()
    for _ in range(20):
        study.seen(live)
    for thread in threads:
        thread.join()
    assert not errors
    live.board.end(rows[1])
    state = live.board.lines["lora"].state
    assert state == "lr 0.001, step 189/189; lr 3e-05, step 189/189"
