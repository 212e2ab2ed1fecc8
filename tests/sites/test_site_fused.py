"""Fused projections: moving one role's rows moves that role's tensor in attention, and no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.models import tiny, tiny_batch
from tunewise.sites import Site, find_sites

ROLES = ("query", "key", "value")


class Attended(TorchFunctionMode):
    """Keeps query, key and value of the first attention call."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: tuple[Tensor, ...] = ()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is nn.functional.scaled_dot_product_attention and not self.seen:
            self.seen = tuple(tensor.clone() for tensor in args[:3])
        return func(*args, **(kwargs or {}))


def attended(model: nn.Module, name: str, patch: pytest.MonkeyPatch) -> tuple[Tensor, ...]:
    seen: list[tuple[Tensor, ...]] = []
    if name == "bloom":
        attention = model.transformer.h[0].self_attention
        whole = type(attention)._reshape
        patch.setattr(
            type(attention),
            "_reshape",
            lambda self, fused: seen.append(whole(self, fused)) or whole(self, fused),
        )
    with torch.no_grad(), Attended() as mode:
        model(**tiny_batch(name))
    return seen[0] if seen else mode.seen


def fused(model: nn.Module, role: str) -> Site:
    return next(site for site in find_sites(model) if site.role == role and site.layer == 0)


def move(site: Site, rows: Tensor) -> None:
    weight = site.weight
    assert weight is not None
    with torch.no_grad():
        (weight.T if site.transposed else weight)[rows] += 0.5


@pytest.mark.parametrize("name", ["gpt2", "neox", "bloom", "falcon", "phi3", "modernbert"])
@pytest.mark.parametrize("role", ROLES)
def test_rows_of_qkv(name: str, role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(name)
    site = fused(model, "qkv")
    together = torch.cat(list(site.roles.values())).sort().values
    assert torch.equal(together, torch.arange(site.out_features))
    before = attended(model, name, monkeypatch)
    move(site, site.roles[role])
    monkeypatch.undo()
    after = attended(model, name, monkeypatch)
    changed = [part for part, old, new in zip(ROLES, before, after, strict=True) if not torch.equal(old, new)]
    assert changed == [role]


def test_falcon_layouts() -> None:
    from transformers import FalconConfig, FalconForCausalLM

    sizes = {}
    for multi_query in (False, True):
        config = FalconConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            vocab_size=9,
            multi_query=multi_query,
            bos_token_id=1,
            eos_token_id=2,
        )
        sizes[multi_query] = [len(rows) for rows in fused(FalconForCausalLM(config), "qkv").roles.values()]
    assert sizes == {False: [32, 32, 32], True: [32, 8, 8]}


@pytest.mark.parametrize("name", ["phi3", "modernbert"])
def test_rows_of_gate_and_up(name: str) -> None:
    model = tiny(name)
    site = fused(model, "gate_up")
    down = next(s for s in find_sites(model) if s.role == "down" and s.layer == 0)
    seen: list[Tensor] = []
    site.module.register_forward_hook(lambda m, x, y: seen.append(y))
    down.module.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    with torch.no_grad():
        model(**tiny_batch(name))
    both, product = seen[0], seen[1]
    act = nn.functional.silu if name == "phi3" else nn.functional.gelu
    torch.testing.assert_close(act(both[..., site.roles["gate"]]) * both[..., site.roles["up"]], product)


def test_unknown_layout_is_not_guessed() -> None:
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query_key_value, self.dense = nn.Linear(8, 24), nn.Linear(8, 8)

    (site,) = [s for s in find_sites(nn.ModuleDict({"attention": Strange()})) if s.role == "qkv"]
    assert site.roles == {}


def test_transposed_experts() -> None:
    class LlamaExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(3, 8, 24))
            self.down_proj = nn.Parameter(torch.zeros(3, 12, 8))

    up, down = find_sites(nn.ModuleDict({"experts": LlamaExperts()}))
    assert (up.transposed, up.in_features, up.out_features) == (True, 8, 24)
    assert (down.transposed, down.in_features, down.out_features) == (True, 12, 8)


def test_experts_without_gate() -> None:
    experts = nn.ParameterDict({"up_proj": torch.zeros(3, 12, 8), "down_proj": torch.zeros(3, 8, 12)})
    down, up = find_sites(nn.ModuleDict({"experts": experts}))
    assert (up.role, up.transposed, up.in_features, up.out_features) == ("up", False, 8, 12)
    assert (down.role, down.in_features, down.out_features) == ("down", 12, 8)
