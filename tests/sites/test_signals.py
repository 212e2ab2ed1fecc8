"""Contract 12: signals are tapped only while someone listens, and equal what autograd says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import tiny, tiny_batch
from tunewise.core.handle import attach
from tunewise.sites import Site, find_sites, select
from tunewise.sites.signals import Signals


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules())


@pytest.fixture(params=["bert", "gpt2", "llama"])
def case(request: pytest.FixtureRequest) -> Iterator[tuple[nn.Module, dict[str, Tensor], list[Site]]]:
    model = tiny(request.param)
    sites = [s for s in select(find_sites(model), "linear & layers[0]") if s.rows is None]
    assert sites
    yield model, tiny_batch(request.param), sites
    assert hooks(model) == 0


Case = tuple[nn.Module, dict[str, Tensor], list[Site]]


def test_activations_are_inputs_and_outputs_of_every_call(case: Case) -> None:
    model, batch, sites = case
    signals, heard = Signals(), {}
    with signals.activations(sites, lambda s, x, y: heard.__setitem__(s.name, (x, y))), torch.no_grad():
        assert signals.listening == len(sites) == hooks(model)
        model(**batch)
    assert signals.listening == 0 and heard.keys() == {s.name for s in sites}
    for site in sites:
        x, y = heard[site.name]
        assert not x.requires_grad
        torch.testing.assert_close(site.module(x), y)


def test_weight_gradients_of_frozen_weights_equal_autograds(case: Case) -> None:
    model, batch, sites = case
    model(**batch).loss.backward()
    wanted = {s.name: s.module.weight.grad.clone() for s in sites}  # type: ignore[union-attr,operator]
    model.zero_grad()
    attach(model, "lora(rank=2)")
    heard: dict[str, Tensor] = {}

    def hear(site: Site, g: Tensor) -> None:
        heard[site.name] = heard.get(site.name, 0) + g

    with Signals().weight_grad(sites, hear):
        model(**batch).loss.backward()
    for site in sites:
        assert site.module.weight.grad is None
        found = heard[site.name].T if site.transposed else heard[site.name]
        torch.testing.assert_close(found, wanted[site.name], rtol=1e-4, atol=1e-6)


def test_output_gradients_equal_autograds(case: Case) -> None:
    model, batch, sites = case
    site, kept = sites[0], []
    hook = site.module.register_forward_hook(lambda m, x, y: (y.retain_grad(), kept.append(y))[0])
    heard: list[Any] = []
    with Signals().output_gradients([site], lambda s, x, g: heard.append((x, g))):
        model(**batch).loss.backward()
    hook.remove()
    assert len(heard) == len(kept) == 1
    torch.testing.assert_close(heard[0][1], kept[0].grad)


def test_hooks_go_when_the_block_fails(case: Case) -> None:
    model, batch, sites = case
    signals = Signals()

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), signals.activations(sites, fail):
        model(**batch)
    assert signals.listening == 0
