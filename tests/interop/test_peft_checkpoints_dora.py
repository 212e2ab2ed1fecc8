"""DoRA's checkpoints in transformers' own `load_adapter`, and under both names of its magnitudes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import tiny, tiny_batch
from tunewise.core.errors import UserError
from tunewise.core.handle import attach
from tunewise.core.recipe import Recipe
from tunewise.delta.dora import DoRA
from tunewise.delta.lora import LoRA
from tunewise.interop.peft import read_peft, write_peft

peft = pytest.importorskip("peft")


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(**tiny_batch("llama")).logits
    return result


def _ours(method: str, folder: Path) -> torch.Tensor:
    model = tiny("llama")
    handle = attach(model, method, seed=0)
    make = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(torch.randn(p.shape, generator=make) * 0.2)
    write_peft(handle, folder)
    return _logits(model)


def _transformers(folder: Path) -> tuple[torch.Tensor, Any]:
    model: Any = tiny("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = model.load_adapter(str(folder))
    return _logits(model), found


@pytest.mark.parametrize(
    "method",
    [
        "dora(rank=3)",
        'dora(rank=3, sites="linear | embedding")',
        "lora(rank=3)",
        "loha(rank=3)",
        "lokr(rank=3)",
        "oft(block_size=8)",
        "ia3",
        "fourierft(frequencies=50)",
        "miss(rank=4)",
    ],
)
def test_transformers_load_adapter_answers_the_same(method: str, tmp_path: Path) -> None:
    wanted = _ours(method, tmp_path)
    found, report = _transformers(tmp_path)
    assert not report.missing_keys and not report.unexpected_keys
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_transformers_drops_the_magnitudes_under_the_name_that_peft_writes(tmp_path: Path) -> None:
    """Why we write `lora_magnitude_vector.weight`: PEFT finds both names, transformers 5 this one alone."""
    wanted = _ours("dora(rank=3)", tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    assert any(k.endswith("lora_magnitude_vector.weight") for k in tensors)
    renamed = {
        k.replace("lora_magnitude_vector.weight", "lora_magnitude_vector"): v for k, v in tensors.items()
    }
    save_file(renamed, file, metadata={"format": "pt"})
    found, report = _transformers(tmp_path)
    assert any("magnitude" in key for key in report.missing_keys)
    assert float((found - wanted).abs().max()) > 1e-2

    model = tiny("llama")
    read_peft(model, tmp_path)
    torch.testing.assert_close(_logits(model), wanted, rtol=1e-5, atol=1e-5)
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path)
    torch.testing.assert_close(_logits(theirs), wanted, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_without_magnitudes_or_without_use_dora_is_refused(tmp_path: Path) -> None:
    _ours("dora(rank=3)", tmp_path)
    file, options = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    config = json.loads(options.read_text())
    options.write_text(json.dumps(config | {"use_dora": False}))
    with pytest.raises(UserError, match="holds lora_magnitude_vector.weight of .* do not need"):
        read_peft(tiny("llama"), tmp_path)
    options.write_text(json.dumps(config))
    save_file({k: v for k, v in load_file(file).items() if "magnitude" not in k}, file)
    model = tiny("llama")
    with pytest.raises(UserError, match="lacks lora_magnitude_vector of"):
        read_peft(model, tmp_path)
    assert not model.__dict__.get("tw_adaptations")


def test_dora_beside_lora_is_refused(tmp_path: Path) -> None:
    handle = attach(tiny("llama"), Recipe(delta=[DoRA(sites="query"), LoRA(sites="key")]))
    with pytest.raises(UserError, match="PEFT keeps DoRA at all modules or at none"):
        write_peft(handle, tmp_path / "out")
