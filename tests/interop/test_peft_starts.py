"""PiSSA, OLoRA, CorDA, EVA and rsLoRA start, and answer, as PEFT's."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import tunewise as tw
from tests.models import tiny, tiny_batch
from tunewise.core.handle import Handle, attach
from tunewise.interop.export import export

peft = pytest.importorskip("peft")
NAMES = ["q_proj", "k_proj", "up_proj", "down_proj"]
SITES = "query | key | up | down"


def _batches(n: int = 3) -> list[dict[str, torch.Tensor]]:
    make = torch.Generator().manual_seed(2)
    return [{"input_ids": torch.randint(3, 99, (1, 60), generator=make)} for _ in range(n)]


def _theirs(**options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules=NAMES, **options)).eval()


def _same(handle: Handle, model: Any, rtol: float = 1e-4) -> None:
    """s B A and the residual weight of every layer are those of PEFT's model."""
    layers = dict(model.base_model.model.named_modules())
    assert len(handle.sites) == 8
    t: Any
    for _, site, t in handle.sites:
        layer = layers[site.name]
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        wanted = layer.scaling["default"] * b @ a
        residual = site.module.weight - t.part.s * t.B0 @ t.A0  # type: ignore[operator]
        scale = float(wanted.abs().max())
        torch.testing.assert_close(t.part.s * t.B @ t.A, wanted, rtol=rtol, atol=rtol * scale)
        torch.testing.assert_close(residual, layer.base_layer.weight, rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("pissa(rank=4, alpha=12, sites='{}')", {"r": 4, "lora_alpha": 12, "init_lora_weights": "pissa"}),
        ("olora(rank=4, alpha=12, sites='{}')", {"r": 4, "lora_alpha": 12, "init_lora_weights": "olora"}),
    ],
)
def test_starts_from_weights_are_theirs(method: str, options: dict[str, Any]) -> None:
    _same(attach(tiny("llama"), method.format(SITES)), _theirs(**options))


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_is_theirs(mode: str) -> None:
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    base, batches = tiny("llama"), _batches()
    config = peft.LoraConfig(
        target_modules=NAMES,
        r=4,
        lora_alpha=8,
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=mode),
    )

    @torch.no_grad()
    def passes() -> None:
        for batch in batches:
            base(**batch)

    preprocess_corda(base, config, run_model=passes)
    handle = attach(tiny("llama"), f"corda(rank=4, alpha=8, mode='{mode}', sites='{SITES}')")
    tw.calibrate(handle, batches)
    _same(handle, peft.get_peft_model(base, config), rtol=1e-3 if mode == "ipm" else 2e-2)


def test_eva_is_theirs() -> None:
    from peft.tuners.lora.config import EvaConfig
    from peft.tuners.lora.eva import get_eva_state_dict

    batches, model = _batches(8), tiny("llama")
    config = peft.LoraConfig(
        target_modules=NAMES, r=8, init_lora_weights="eva", eva_config=EvaConfig(rho=2.0, tau=0.9)
    )
    theirs = get_eva_state_dict(copy.deepcopy(model), batches, config, show_progress_bar=False)
    handle = attach(model, f"eva(rank=8, rho=2.0, tau=0.9, sites='{SITES}')")
    tw.calibrate(handle, batches)
    ours = {site.name: t for _, site, t in handle.sites}
    assert {n.removeprefix("base_model.model.") for n in theirs} == set(ours)
    assert Counter(len(t.A) for t in ours.values()) == Counter(map(len, theirs.values()))
    for name, wanted in theirs.items():
        found = ours[name].A
        n = min(len(found), len(wanted), 4)  # the leading ones are apart from each other
        cosines = (found[:n] * wanted[:n].to(found)).sum(1).abs()
        assert float(cosines.min()) > 0.99, name


def test_rslora_answers_as_theirs(tmp_path: Path) -> None:
    model = tiny("llama")
    handle = attach(model, f"rslora(rank=4, sites='{SITES}')")
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    theirs = _theirs(r=4, lora_alpha=16, use_rslora=True)
    layers = dict(theirs.base_model.model.named_modules())
    t: Any
    for _, site, t in handle.sites:
        assert layers[site.name].scaling["default"] == t.part.s == 8.0
        layers[site.name].lora_A["default"].weight.data.copy_(t.A)
        layers[site.name].lora_B["default"].weight.data.copy_(t.B)
    batch = tiny_batch("llama")
    torch.testing.assert_close(theirs(**batch).logits, model(**batch).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "method", ["pissa(rank=3)", "sorsa(rank=3)", "corda(rank=3)", "olora(rank=3)", "eva(rank=3)"]
)
@pytest.mark.parametrize("to", ["lora", "peft"])
def test_exported_starts_answer_the_same_on_the_original_base(method: str, to: str, tmp_path: Path) -> None:
    model, batch = tiny("llama"), tiny_batch("llama")
    handle = attach(model, method)
    if method.startswith(("corda", "eva")):
        tw.calibrate(handle, _batches())
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    if to == "peft" and method.startswith("sorsa"):
        with pytest.raises(tw.UserError, match="GatedLowRank cannot be written as a PEFT checkpoint"):
            export(handle, to, tmp_path / "out")
        return
    facts = export(handle, to, tmp_path / "out")
    assert facts["relative_error"] == 0.0
    if to == "lora" and not method.startswith("eva"):
        assert set(facts["ranks"].values()) == {6}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "out").eval()
        found, wanted = loaded(**batch).logits, model(**batch).logits
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        merged = loaded.merge_and_unload()
    changes = handle.materialize()
    for _, site, _ in handle.sites:
        now, before = merged.get_submodule(site.name).weight, site.module.weight
        error = (now - before - changes[site.name]).norm() / before.norm()  # type: ignore[operator]
        assert float(error) < 1e-6
