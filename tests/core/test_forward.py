"""Contract 2: the backbone stays itself, under accelerate's offload, compilation and switching too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from torch import Tensor, nn

from tests.models import tiny, tiny_batch
from tunewise.core.errors import UserError
from tunewise.core.forward import forward_of
from tunewise.core.handle import Handle, attach

METHODS = [
    "lora(rank=2)",
    "lora(rank=2, dropout=0.1)",
    "bias_scale",
    "series_adapter",
    "ladder",
    "full",
    "prompt_tuning(tokens=2)",
]
CPU = torch.device("cpu")


def moved(model: nn.Module, method: str, name: str = "default", seed: int = 1) -> Handle:
    handle = attach(model, method, seed=seed, name=name)
    make = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(torch.randn(p.shape, generator=make) * 0.05)
    return handle


@torch.no_grad()
def logits(model: Any, name: str = "llama") -> Tensor:
    return model(**tiny_batch(name)).logits  # type: ignore[no-any-return]


def reference(method: str) -> tuple[Tensor, Tensor]:
    model = tiny("llama")
    base = logits(model)
    moved(model, method)
    return base, logits(model)


@pytest.mark.parametrize("method", METHODS)
def test_attach_then_offload(method: str) -> None:
    base, wanted = reference(method)
    assert not torch.equal(base, wanted)
    model = tiny("llama")
    handle = moved(model, method)
    cpu_offload(model, CPU)
    assert torch.equal(logits(model), wanted)
    remove_hook_from_submodules(model)
    assert torch.equal(logits(model), wanted)
    assert all(p.device == CPU for p in handle.parameters())
    handle.detach()
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("first", ["detach", "remove hooks"])
@pytest.mark.parametrize("method", METHODS[:5])
def test_offload_then_attach(method: str, first: str) -> None:
    base, wanted = reference(method) if method != "bias_scale" else reference("bias_scale")
    model = tiny("llama")
    cpu_offload(model, CPU)
    handle = moved(model, method)
    assert all(p.device == CPU for p in handle.parameters())
    assert torch.equal(logits(model), wanted)
    if first == "remove hooks":
        remove_hook_from_submodules(model)
        assert torch.equal(logits(model), wanted)
    handle.detach()
    assert torch.equal(logits(model), base)
    assert all(forward_of(m) is None for m in model.modules())
    remove_hook_from_submodules(model)
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize(
    ("method", "words"), [("full", "is offloaded and cannot be trained"), ("prompt_tuning", "offloaded")]
)
def test_offloaded_weights_that_are_needed_are_refused(method: str, words: str) -> None:
    model = tiny("llama")
    cpu_offload(model, CPU)
    with pytest.raises(UserError, match=words):
        attach(model, method)


def test_a_meta_model_stays_meta() -> None:
    handle = attach(tiny("llama").to("meta"), "lora(rank=2)")
    assert all(p.is_meta for p in handle.parameters())


class Graphs:
    """Counts what dynamo compiles."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, module: Any, example: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        self.count += 1
        return aot_eager(module, example)


def test_compiled_equals_eager_and_adaptations_switch() -> None:
    torch._dynamo.reset()
    model, graphs = tiny("llama"), Graphs()
    a = moved(model, "lora(rank=2, sites='query')")
    b = moved(model, "series_adapter(sites='mlp')", "other", seed=2)
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    counts = []
    for handle in (a, b, a, b):
        handle.activate()
        wanted = logits(model)
        torch.testing.assert_close(logits(compiled), wanted, rtol=1e-5, atol=1e-6)
        counts.append(graphs.count)
    assert counts == [1, 2, 2, 2]  # one graph per set of adaptations; coming back costs nothing
    torch._dynamo.reset()


def test_a_compiled_model_trains_in_ones_own_loop() -> None:
    torch._dynamo.reset()
    found = []
    for compiled in (False, True):
        model, graphs = tiny("llama"), Graphs()
        handle = moved(model, "lora(rank=2, sites='query')")
        optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
        run = handle.watch(optimizer)
        called = torch.compile(model, backend=graphs) if compiled else model
        for _ in range(4):
            optimizer.zero_grad()
            called(**tiny_batch("llama")).loss.backward()
            optimizer.step()
        assert run.step == 4 and graphs.count <= 2
        found.append([p.detach() for p in handle.parameters()])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)
    torch._dynamo.reset()


def test_a_site_that_is_never_called_is_named() -> None:
    model = tiny("llama")
    handle = attach(model, "lora(rank=2)")
    handle.watch(optimizer := torch.optim.SGD(handle.parameters(), lr=0.1))
    with pytest.raises(UserError, match="q_proj owns a LoRA and was not called in the first forward pass"):
        optimizer.step()


def test_accelerates_slot_is_respected() -> None:
    model = tiny("llama")
    cpu_offload(model, CPU)
    handle = attach(model, "lora(rank=2)")
    module = handle.sites[0][1].module
    assert forward_of(module) is module.__dict__["_old_forward"] is not module.__dict__["forward"]
