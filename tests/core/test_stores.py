"""Contract 10: stores are named, bounded, checkpointed and keyed by sample id."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tunewise.core.errors import UserError
from tunewise.core.recipe import Recipe
from tunewise.core.run import Run
from tunewise.core.stores import Store
from tunewise.delta.lora import LoRA

from .toys import FeatureBank, interrupted, rows, run_of, start


def test_a_store_is_bounded_and_forgets_the_oldest() -> None:
    store = Store("log", 2)
    store["a"], store["b"], store["a"], store["c"] = 1, 2, 3, 4
    assert dict(store) == {"a": 3, "c": 4} and store.evicted == 1 and len(store) == 2
    del store["a"]
    assert "a" not in store


def test_keys_are_sample_ids_and_capacities_positive() -> None:
    with pytest.raises(UserError, match="keyed by sample ids .strings., not int"):
        Store("log", 2)[3] = 1  # type: ignore[index]
    with pytest.raises(UserError, match="needs a capacity of at least 1, not 0"):
        Store("log", 0)


def test_a_store_survives_saving_with_its_order() -> None:
    store, again = Store("bank", 3), Store("bank", 9)
    store.update({"b": torch.ones(2), "a": [1, {"x": 2.0}]})
    again.load_state_dict(store.state_dict())
    assert list(again) == ["b", "a"] and again.capacity == 3


def test_one_name_is_one_store() -> None:
    run = run_of("lora")
    assert run.store("bank", 4) is run.store("bank")


@pytest.mark.parametrize("micro", [None, 2])
def test_a_bank_keyed_by_sample_id_is_bounded_and_resumes(tmp_path: Path, micro: int | None) -> None:
    def make(name: str) -> Run:
        recipe = Recipe(delta=LoRA(2), diagnose=FeatureBank(10))
        return run_of(recipe, tmp_path / name, checkpoint_every=2, micro_batch=micro)

    whole, cut = start(make("whole")), interrupted(lambda: make("cut"), 5)
    bank = whole.store("bank")
    assert len(bank) == 10 and bank.evicted > 0 and set(bank) <= {e["id"] for e in rows(24)}
    assert list(bank.items()) == list(cut.store("bank").items())
    assert bank.state_dict() == cut.store("bank").state_dict()
