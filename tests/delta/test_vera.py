"""VeRA: one pair of projections for all shapes, drawn anew, and exact components."""

from __future__ import annotations

import pytest
import torch

from tests.delta.box import Box
from tests.models import tiny, tiny_batch
from tunewise.core.handle import attach, restore
from tunewise.delta import vera
from tunewise.delta.vera import VeRA


def test_all_sites_share_slices_of_one_pair(tmp_path: object) -> None:
    model = tiny("llama")
    handle = attach(model, VeRA(rank=4))
    (owner,) = handle.owned.values()
    assert owner.A.shape == (4, 64) and owner.B.shape == (64, 4)
    assert handle.trainable == sum(4 + (s.out_features or 0) for _, s, _ in handle.sites)
    with torch.no_grad():
        for p in handle.parameters():
            p.normal_()
    wanted = model(**tiny_batch("llama")).logits
    handle.save(tmp_path)  # type: ignore[arg-type]
    torch.manual_seed(5)
    other = tiny("llama")
    restore(other, tmp_path)  # type: ignore[arg-type]
    assert torch.equal(other(**tiny_batch("llama")).logits, wanted)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_components_multiply_to_the_change(name: str) -> None:
    handle = attach(tiny(name), VeRA(rank=4))
    with torch.no_grad():
        for p in handle.parameters():
            p.normal_()
    changes = handle.materialize()
    for _, site, t in handle.sites:
        b, a = t.part.components(t)
        torch.testing.assert_close(b @ a, changes[site.name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("rank", "tokens", "form"), [(256, 2048, "changed"), (256, 8, "beside"), (4, 2048, "beside")]
)
def test_the_cheaper_form_runs(rank: int, tokens: int, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    for name in ("beside_linear", "changed_linear"):
        monkeypatch.setattr(vera, name, lambda f, x, *_, name=name: ran.append(name) or x)
    model = Box(256, 256)
    attach(model, VeRA(rank=rank, sites="linear"))
    model(torch.zeros(tokens, 256))
    assert ran == [f"{form}_linear"]


def test_dropout_acts_in_training_alone() -> None:
    model = Box(16, 16)
    handle = attach(model, VeRA(rank=4, dropout=0.5, sites="linear"))
    with torch.no_grad():
        for p in handle.parameters():
            p.normal_()
    x = torch.randn(3, 16)
    assert torch.equal(model.eval()(x), model(x))
    assert not torch.equal(model.train()(x), model(x))
