"""Instruction tuning of a real decoder, as a user would do it."""

import pytest

from benchmarks.gsm8k import run


@pytest.mark.slow
def test_thirty_steps_of_lora_lower_the_loss_on_unseen_answers_and_the_merged_folder_generates() -> None:
    found = run(rows=24)
    assert found["fall"] >= 0.10, found
    assert found["answer"].strip(), found
