"""Contract 9: streams have an order and a position of their own, and test rows are never handed out."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import torch

from tunewise.core.errors import UserError
from tunewise.core.part import Part
from tunewise.core.recipe import Recipe
from tunewise.core.run import Run
from tunewise.core.streams import Stream, Streams, seed_of
from tunewise.delta.lora import LoRA

from .toys import interrupted, rows, run_of, same_state, start


def ids(batches: list[list[dict[str, object]]]) -> list[list[object]]:
    return [[e["id"] for e in b] for b in batches]


def test_order_depends_on_seed_name_and_epoch_alone() -> None:
    data = rows(20)
    stream, again = Stream("train", data, 6, seed=1), Stream("train", list(data), 6, seed=1)
    epochs = [ids([next(stream) for _ in range(4)]) for _ in range(2)]
    next(again)
    assert ids([data[i] for i in b] for b in again.order(1)) == epochs[1] != epochs[0]  # type: ignore[arg-type]
    assert [len(b) for e in epochs for b in e].count(2) == 2  # the shorter batch of each epoch is kept
    assert all(sorted(i for b in e for i in b) == sorted(e["id"] for e in data) for e in epochs)  # type: ignore[type-var]
    assert Stream("train", data, 6, seed=2).order(0) != again.order(0)
    assert Stream("meta", data, 6, seed=1).order(0) != again.order(0)
    assert seed_of("a", 1) == seed_of("a", 1) != seed_of("a", 2)


def test_at_epoch_end_is_said_once_per_epoch() -> None:
    stream = Stream("train", rows(9), 4, seed=0)
    ends = [(next(stream), stream.at_epoch_end)[1] for _ in range(6)]
    assert ends == [False, False, True] * 2 and len(stream) == 3


def test_buckets_hold_rows_of_like_length() -> None:
    data = [{"id": str(i), "length": (i * 37) % 64} for i in range(64)]
    for by_length in (True, False):
        stream = Stream("train", data, 8, seed=0, by_length=by_length)
        spread = [
            max(lengths) - min(lengths)
            for b in stream.order(0)
            if (lengths := [data[i]["length"] for i in b])
        ]  # type: ignore[type-var,operator]
        assert max(spread) <= 8 if by_length else max(spread) > 30
        lengths = [data[b[0]]["length"] for b in stream.order(0)]
        assert lengths != sorted(lengths)  # type: ignore[type-var]


def test_positions_are_saved_also_of_streams_not_opened_yet() -> None:
    data = {"train": rows(20), "valid": rows(8, "valid")}
    first = Streams(data, seed=0)
    train, meta = first.open("train", 4), first.open("meta", 2)
    [next(train) for _ in range(7)], next(meta)
    second = Streams(data, seed=0)
    second.load_state_dict(first.state_dict())
    assert ids([next(second.open("train", 4))]) == ids([next(train)])
    third = Streams(data, seed=0)
    third.load_state_dict(second.state_dict())  # `meta` was never opened in the second one
    assert ids([next(third.open("meta", 2))]) == ids([next(meta)])


def test_other_data_or_sizes_are_refused_on_resume() -> None:
    saved = Stream("train", rows(20), 4, seed=0).state_dict()
    with pytest.raises(
        UserError, match="had 20 rows in batches of 4 when the run was saved, now 21 in batches of 4"
    ):
        Stream("train", rows(21), 4, seed=0).load_state_dict(saved)


def test_test_rows_are_never_handed_out() -> None:
    with pytest.raises(UserError, match="Test rows are never handed to a run"):
        run_of("lora", data={"train": rows(8), "test": rows(8, "test")})
    with pytest.raises(UserError, match='There is no stream "test"'):
        run_of("lora").batches("test", 2)


def test_streams_fall_back_and_are_refused_by_name() -> None:
    run = run_of("lora")
    assert {str(e["id"])[:5] for e in next(run.batches("calibration", 4))} == {"train"}
    assert {str(e["id"])[:5] for e in next(run.batches("meta", 4))} == {"valid"}
    with pytest.raises(UserError, match="This run has no rows for the stream general"):
        run.batches("general", 2)
    with pytest.raises(UserError, match='no stream "trian"; did you mean "train"'):
        run.batches("trian", 2)
    with pytest.raises(UserError, match="The stream train has no rows"):
        run_of("lora", data={"train": []}).batches("train", 2)


class General(Part):
    """Draws from a stream of its own at every step, and random numbers."""

    slot: ClassVar[str] = "data"
    streams: ClassVar[tuple[str, ...]] = ("general",)

    def before_step(self, run: Run) -> None:
        batch = run.collate(next(run.batches("general", 3)))
        noise = float(torch.rand((), generator=run.rng("noise")))
        self.state["seen"] = self.state.get("seen", []) + [[*batch.ids, noise]]


def test_a_part_declares_and_draws_its_own_stream(tmp_path: Path) -> None:
    data = {"train": rows(24), "general": rows(7, "general")}

    def make(name: str) -> Run:
        return run_of(Recipe(delta=LoRA(2), data=General()), tmp_path / name, data=data, checkpoint_every=2)

    whole, cut = start(make("whole")), interrupted(lambda: make("cut"), 3)
    seen = [r.recipe["data"][0].state["seen"] for r in (whole, cut)]
    assert seen[0] == seen[1] and len(seen[0]) == 6 and same_state(whole, cut)
    assert same_state(whole, start(run_of("lora(rank=2)")))  # nobody else's order or noise has changed
    with pytest.raises(UserError, match="General needs rows for the stream general, and this run has none"):
        run_of(Recipe(delta=LoRA(2), data=General()))
