"""Selectors: terms, set algebra, fused roles, layers per stack, kinds, and errors that help."""

from __future__ import annotations

from functools import cache

import pytest

from tests.models import tiny
from tunewise.core.errors import UserError
from tunewise.sites import Site, find_sites, select

LINEAR = ("linear",)


@cache
def sites(name: str) -> list[Site]:
    return find_sites(tiny(name))


def names(model: str, selector: str | list[str], kinds: tuple[str, ...] | None = LINEAR) -> list[str]:
    return [site.name for site in select(sites(model), selector, kinds=kinds)]


def roles(model: str, selector: str | list[str], kinds: tuple[str, ...] | None = LINEAR) -> list[str]:
    return [site.role for site in select(sites(model), selector, kinds=kinds)]


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("query | value", ["query", "value"] * 2),
        ("linear", ["query", "key", "value", "output", "up", "down"] * 2),
        ("linear & layers[-1]", ["query", "key", "value", "output", "up", "down"]),
        ("(query | up) & layers[1:]", ["query", "up"]),
        ("query & layers[0, -1]", ["query", "query"]),
        ("mlp", ["up", "down"] * 2),
        ("attention & ~output & layers[0]", ["query", "key", "value"]),
        ("all & ~linear", ["pooler", "head"]),
        ("bert.encoder.layer.1.output.dense", ["down"]),
        ("layer.0.output.dense", ["down"]),
        ("attention.self.query", ["query", "query"]),
        ("attention.self & layers[0]", ["query", "key", "value"]),
        ("'*.self.que*'", ["query", "query"]),
        ('"classifier"', ["head"]),
        (r"re:.*\.(query|key)", ["query", "key"] * 2),
        (["query", "layers[1] & up"], ["query", "query", "up"]),
    ],
)
def test_terms(selector: str | list[str], expected: list[str]) -> None:
    assert roles("bert", selector) == expected


def test_suffix_stands_at_a_dot() -> None:
    assert names("llama", "q_proj") == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    with pytest.raises(UserError):
        names("llama", "_proj")


def test_kinds_decide_what_mlp_means() -> None:
    assert names("bert", "mlp & layers[0]", ("mlp", "attention")) == ["bert.encoder.layer.0.output"]
    assert roles("bert", "attention | mlp", ("attention", "mlp")) == ["attention", "mlp"] * 2
    assert roles("bert", "block", ("block",)) == ["block"] * 2


def test_fused_roles_are_narrowed() -> None:
    both = select(sites("gpt2"), "query | value", kinds=LINEAR)
    assert [site.role for site in both] == ["query|value"] * 2
    assert both[0].out_features == 64 and both[0].rows is not None
    assert both[0].rows.tolist() == [*range(32), *range(64, 96)]
    assert (
        both[0].module
        is sites("gpt2")[sites("gpt2").index(next(s for s in sites("gpt2") if s.role == "qkv"))].module
    )
    whole = select(sites("gpt2"), "query | key | value", kinds=LINEAR)[0]
    assert whole.rows is None and whole.role == "qkv"
    assert roles("gpt2", "linear & ~query & layers[0]") == ["key|value", "output", "up", "down"]
    again = select(both, "value")[0]
    assert again.role == "value" and again.out_features == 32
    assert roles("phi3", "gate & layers[0]") == ["gate"]
    assert roles("mixtral", "gate & layers[0]", ("linear", "experts")) == ["gate"]


def test_layers_count_per_stack() -> None:
    assert names("t5", "encoder & query & layers[-1]") == ["encoder.block.1.layer.0.SelfAttention.q"]
    assert len(names("t5", "query & layers[1]")) == 3
    assert names("t5", "EncDecAttention & value & layers[0]") == ["decoder.block.0.layer.1.EncDecAttention.v"]
    assert all(name.startswith("vision_model") for name in names("clip", "vision & linear"))


def test_plain_model_without_blocks() -> None:
    from torch import nn

    found = find_sites(
        nn.ModuleDict(
            {"body": nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)), "classifier": nn.Linear(2, 2)}
        )
    )
    assert [site.name for site in select(found, "linear")] == ["body.0", "body.1"]


@pytest.mark.parametrize(
    ("model", "selector", "message"),
    [
        ("bert", "qury", 'did you mean "query"'),
        ("bert", "query | c_attn", '"c_attn" matches no site'),
        ("bert", "norm", "matches only norm sites"),
        ("bert", "layers[7]", "has layers 0 to 1"),
        ("bert", "layers[x]", "whole numbers"),
        ("bert", "query & key", "selects no site"),
        ("bert", "query and value", "write | for"),
        ("bert", "query, value", "write | for"),
        ("bert", "query + value", "not understood"),
        ("bert", "query | (value", "at character 9"),
        ("bert", "", "empty"),
        ("bert", [], "empty"),
        ("bert", "re:(", "no regular expression"),
        ("bert", "re:query", "selects no site"),
        ("bert", "*.query", "quotes"),
    ],
)
def test_errors(model: str, selector: str | list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        names(model, selector)
    assert message in str(caught.value)


def test_unknown_fused_layout_says_so() -> None:
    from torch import nn

    odd = nn.ModuleDict(
        {"attention": nn.ModuleDict({"query_key_value": nn.Linear(8, 24), "dense": nn.Linear(8, 8)})}
    )
    assert [site.role for site in select(find_sites(odd), "qkv")] == ["qkv"]
    with pytest.raises(UserError, match="row order of the fused"):
        select(find_sites(odd), "query")
