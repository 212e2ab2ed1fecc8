from __future__ import annotations

import pytest
import torch

from tests.models import tiny
from tunewise.core.errors import UserError
from tunewise.core.handle import attach
from tunewise.post.algebra import add, average, ema, interpolate, scale, to_lora, to_lora_from_components


def _states() -> list[dict[str, torch.Tensor]]:
    return [{"a": torch.randn(3, 2), "b": torch.randn(4), "rows": torch.arange(3)} for _ in range(3)]


def _low_rank(out: int, ins: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(out, rank), torch.randn(rank, ins)


def test_average_is_the_weighted_mean_of_every_tensor() -> None:
    states = _states()
    found = average(states, [1, 1, 2])
    expected = (states[0]["a"] + states[1]["a"] + 2 * states[2]["a"]) / 4
    torch.testing.assert_close(found["a"], expected)
    torch.testing.assert_close(average(states)["b"], sum(s["b"] for s in states) / 3)
    assert torch.equal(found["rows"], torch.arange(3))


def test_average_of_one_state_is_a_copy() -> None:
    state = _states()[0]
    found = average([state])
    assert torch.equal(found["a"], state["a"])
    found["a"].zero_()
    assert state["a"].abs().sum() > 0


def test_interpolate_and_ema_reach_both_ends() -> None:
    a, b, _ = _states()
    assert torch.equal(interpolate(a, b, 0.0)["a"], a["a"])
    assert torch.equal(interpolate(a, b, 1.0)["a"], b["a"])
    torch.testing.assert_close(interpolate(a, b, 1.5)["a"], 1.5 * b["a"] - 0.5 * a["a"])
    torch.testing.assert_close(ema(a, b, 0.9)["b"], 0.9 * a["b"] + 0.1 * b["b"])


def test_sums_of_bfloat16_run_in_float32() -> None:
    states = [{"a": torch.full((4,), value, dtype=torch.bfloat16)} for value in (1.0, 1.0078125)] * 2
    found = average(states)["a"]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, torch.full((4,), 1.00390625).bfloat16())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"a": torch.zeros(3, 2), "c": torch.zeros(4)}, "Only one of the adaptations has the tensor b"),
        ({"a": torch.zeros(2, 3), "b": torch.zeros(4)}, r"a has the shapes \(3, 2\) and \(2, 3\)"),
    ],
)
def test_states_that_do_not_fit_are_refused(change: dict[str, torch.Tensor], words: str) -> None:
    with pytest.raises(UserError, match=words):
        average([{"a": torch.zeros(3, 2), "b": torch.zeros(4)}, change])


def test_other_bad_input_is_refused() -> None:
    a, b, _ = _states()
    with pytest.raises(UserError, match="indices that differ"):
        average([a, {**b, "rows": torch.tensor([0, 2, 1])}])
    with pytest.raises(UserError, match="as many weights"):
        average([a, b], [1.0])
    with pytest.raises(UserError, match="other than 0"):
        average([a, b], [1.0, -1.0])
    with pytest.raises(UserError, match="0 states need"):
        average([])
    with pytest.raises(UserError, match="between 0 and 1"):
        ema(a, b, 1.5)
    with pytest.raises(UserError, match="a matrix and a rank"):
        to_lora(torch.zeros(2, 2, 2), 1)


def test_changes_add_up_like_weights() -> None:
    model = tiny("bert")
    handle = attach(model, "lora(rank=2)")
    with torch.no_grad():
        for p in handle.parameters():
            p.normal_()
    change = handle.materialize()
    site = next(iter(change))
    total = add(change, scale(change, -0.5), {"elsewhere": torch.ones(2)})
    torch.testing.assert_close(total[site], 0.5 * change[site])
    assert torch.equal(total["elsewhere"], torch.ones(2))
    with pytest.raises(UserError, match="cannot be combined"):
        add(change, {site: torch.zeros(1, 1)})


@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
def test_to_lora_is_exact_where_the_rank_allows(shape: tuple[int, int]) -> None:
    up, down = _low_rank(*shape, rank=3)
    b, a, error = to_lora(up @ down, 3)
    assert b.shape == (shape[0], 3) and a.shape == (3, shape[1])
    torch.testing.assert_close(b @ a, up @ down, rtol=1e-4, atol=1e-5)
    assert error < 1e-6


def test_to_lora_reports_the_error_that_it_makes() -> None:
    change = torch.randn(16, 10)
    b, a, error = to_lora(change, 4)
    assert error == pytest.approx(float((change - b @ a).norm() / change.norm()), rel=1e-4)
    assert to_lora(change, 99)[0].shape == (16, 10)
    assert to_lora(torch.zeros(3, 3), 1)[2] == 0.0


def test_components_are_stacked_where_the_rank_allows_and_truncated_like_the_matrix_elsewhere() -> None:
    parts = [(*_low_rank(20, 12, 3), 0.5), (*_low_rank(20, 12, 2), -2.0)]
    whole = sum(w * up @ down for up, down, w in parts)
    b, a, error = to_lora_from_components(parts)
    assert error == 0.0 and b.shape == (20, 5)
    torch.testing.assert_close(b @ a, whole)
    b, a, error = to_lora_from_components(parts, rank=2)
    dense = to_lora(whole, 2)
    torch.testing.assert_close(b @ a, dense[0] @ dense[1], rtol=1e-4, atol=1e-4)
    assert error == pytest.approx(dense[2], rel=1e-4) and error > 0.01


def test_average_of_two_adaptations_can_be_loaded() -> None:
    handles = [attach(tiny("llama"), "lora(rank=2)", seed=seed) for seed in (0, 1)]
    target = attach(tiny("llama"), "lora(rank=2)")
    target.load_state(average([h.state() for h in handles]))
    name = next(iter(target.state()))
    expected = (handles[0].state()[name] + handles[1].state()[name]) / 2
    torch.testing.assert_close(target.state()[name], expected)
