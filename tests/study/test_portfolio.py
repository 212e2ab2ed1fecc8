"""Which methods run, and at which rates."""

from __future__ import annotations

from typing import Any

import pytest

from tunewise.core.errors import UserError
from tunewise.core.method import method_names, read_recipe
from tunewise.study.portfolio import DEFAULT, prior, rates, read_methods


def test_default_exists() -> None:
    assert set(DEFAULT.values()) <= set(method_names())
    assert read_methods() == list(DEFAULT.values())


def test_all_holds_every_method() -> None:
    everything = set(method_names())
    assert everything - set(read_methods("all")) == {"copilot", "hst"}  # for causal models, for images
    assert everything - set(read_methods("all", task="image_classification")) == {"copilot"}
    assert "copilot" in read_methods("all", task="causal")


def test_commas_inside_brackets_and_quotes() -> None:
    found = read_methods('lora(rank=4, sites="query, value"), partial , lora + bias_scale')
    assert found[:3] == ["lora(rank=4, sites='query, value')", "partial", "lora + bias_scale"]
    assert found[3:] == ["linear_probe", "full"]
    assert read_methods(["full", "lora, full"]) == ["full", "lora", "linear_probe"]


def test_default_may_be_extended() -> None:
    assert read_methods("default, lora(rank=4)") == [*DEFAULT.values(), "lora(rank=4)"]


def test_language_models_have_no_class_heads() -> None:
    found = read_methods("default", task="causal")
    assert "lora" in found and "full" in found and not {"head_only", "linear_probe"} & set(found)
    with pytest.raises(UserError, match="head_only reads another kind of answer"):
        read_methods("lora, head_only", task="causal")


@pytest.mark.parametrize(
    ("given", "words"), [("lorra", '"lora"'), ("lora(r=4)", '"rank"'), ("lora,,full", "cannot be read")]
)
def test_bad_methods(given: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_methods(given)


def test_nothing_and_no_text() -> None:
    for given in ("", "()", [3]):
        with pytest.raises(UserError):
            read_methods(given)


def test_priors() -> None:
    assert prior(read_recipe("lora(rank=2)")) == (1e-4, 1e-3, 5e-3)
    assert prior(read_recipe("linear_probe")) == ()
    assert prior(read_recipe("LoRA(rank=2)")) == (1e-5, 1e-4, 1e-3)


@pytest.mark.parametrize("n", range(1, 12))
def test_rates_spread_over_the_prior(n: int) -> None:
    found = [rate for rate in rates((1e-4, 1e-3, 5e-3), n) if rate is not None]
    assert len(set(found)) == n and found[0] == 1e-3
    assert all(1e-4 < rate < 5e-3 for rate in found)
    if n > 1:
        assert min(found) < 1e-3 or n == 2
        assert max(found) > 1e-3


def test_no_rate_no_choice() -> None:
    assert rates((), 9) == (None,)


@pytest.mark.parametrize("bad", [(1e-3,), (1e-3, 1e-4, 1e-2), (0.0, 1e-3, 1e-2)])
def test_bad_priors(bad: Any) -> None:
    with pytest.raises(UserError, match="low, default, high"):
        rates(bad, 3)
