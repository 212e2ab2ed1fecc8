"""Generated adapters: written down they answer the same; tasks, sharing, widths, counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.delta.small import moved
from tests.models import tiny, tiny_batch
from tunewise.core.errors import UserError
from tunewise.core.handle import Handle, attach
from tunewise.delta.hyper import HyperAdapter
from tunewise.delta.polyhistor import PolyhistorAdapter, PolyhistorLite
from tunewise.sites import Site

KINDS = (HyperAdapter, PolyhistorAdapter, PolyhistorLite)


def generated(kind: Any, name: str = "bert", move: float = 0.3, **options: Any) -> tuple[Any, Handle]:
    model = tiny(name)
    handle = attach(model, kind(size=4, embedding=6, **options), seed=0)
    moved(handle, move)
    return model, handle


def written_down(handle: Handle, name: str = "bert") -> Handle:
    part: Any = handle.recipe["delta"][0]
    plain, found = part.folded([(s, t) for _, s, t in handle.sites], handle.model)
    new = attach(tiny(name), plain)
    new.load_state({f"{s}.series_adapter.{k}": v.detach() for s, w in found.items() for k, v in w.items()})
    return new


@pytest.mark.parametrize("scale", [0.7, "learned"])
@pytest.mark.parametrize("kind", KINDS)
def test_written_down_the_adapters_answer_the_same(kind: Any, scale: Any) -> None:
    model, handle = generated(kind, scale=scale)
    wanted, batch = model(**tiny_batch("bert")).logits, tiny_batch("bert")
    static = written_down(handle)
    torch.testing.assert_close(static.model(**batch).logits, wanted)
    assert (tiny("bert")(**batch).logits - wanted).abs().max() > 5e-4
    assert type(static.recipe["delta"][0]).__name__ == "SeriesAdapter" and len(static.sites) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_step_zero_is_the_base(kind: Any) -> None:
    model, _ = generated(kind, move=0.0)
    wanted = tiny("bert")(**tiny_batch("bert")).logits
    torch.testing.assert_close(model(**tiny_batch("bert")).logits, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_two_tasks_differ_by_their_embedding_alone(kind: Any) -> None:
    model, handle = generated(kind, tasks=2)
    part, batch = handle.recipe["delta"][0], tiny_batch("bert")
    answers = []
    for task in (0, 1):
        part.task = task  # type: ignore[attr-defined]
        answers.append(model(**batch).logits)
    assert (answers[0] - answers[1]).abs().max() > 3e-4
    with torch.no_grad():
        z = next(i.tensor for n, i in handle.tensors().items() if n.endswith(".tasks"))
        z[1] = z[0]
    torch.testing.assert_close(model(**batch).logits, answers[0])
    model(**batch).loss.backward()
    assert z.grad[1].abs().max() > 0 and not z.grad[0].any()
    with pytest.raises(UserError, match="task=2 is not one of the tasks 0 to 1"):
        attach(tiny("bert"), kind(tasks=2, task=2))


def test_layers_and_positions_have_weights_of_their_own() -> None:
    _, handle = generated(HyperAdapter)
    downs = [t.part.weights(t).down for _, _, t in handle.sites]
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(downs) for b in downs[:i])
    g = handle.sites[0][2].shared
    assert g.layers.shape == (2, 6) and g.positions.shape == (2, 6)


def deep(layers: int) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 24}
    return BertForSequenceClassification(BertConfig(num_hidden_layers=layers, **sizes))


@pytest.mark.parametrize(
    ("kind", "per_layer"), [(HyperAdapter, 6), (PolyhistorLite, 4), (PolyhistorAdapter, 2 * 864)]
)
def test_what_a_further_layer_costs(kind: Any, per_layer: int) -> None:
    counts = [attach(deep(n), kind(size=4, embedding=6)).trainable for n in (2, 5)]
    assert counts[1] - counts[0] == 3 * per_layer


def stages(*widths: int) -> list[Site]:
    return [
        Site(f"stage{i}", "mlp", "mlp", torch.nn.Identity(), layer=i, in_features=w, out_features=w)
        for i, w in enumerate(widths)
    ]


def test_a_template_grows_by_the_kernel_of_each_stage() -> None:
    part, sites = PolyhistorLite(size=3, embedding=5), stages(8, 16, 64)
    shared = {n: p.value for n, p in part.shared(sites).items()}
    shared = {n: torch.randn(v.shape) for n, v in shared.items()}
    for site, c in zip(sites, (1, 2, 8), strict=True):
        own = {n: p.value for n, p in part.tensors(site).items()}
        torch.testing.assert_close(own["K_up"], torch.eye(c) / c)
        t: Any = type("T", (), {**own, "shared": type("S", (), shared)})
        down, up, *_ = part.weights(t)
        assert down.shape == (3 * c, 8 * c) and up.shape == (8 * c, 3 * c)
        torch.testing.assert_close(down[:3, :8] * c, part.matrices(t.shared, t.shared.tasks[0])[0])
        assert part.formula(site) == 2 * c * c
    with pytest.raises(UserError, match="The width of stage1, 12, is no multiple of the narrowest, 8"):
        ragged = stages(8, 12)
        part.shared(ragged)
        part.tensors(ragged[1])


def test_one_network_writes_one_width() -> None:
    with pytest.raises(UserError, match="stage0 has 8 and stage1 has 16|stage1 has 16 and stage0 has 8"):
        HyperAdapter().shared(stages(8, 16))
