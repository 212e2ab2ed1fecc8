"""Every kind of checkpoint that PEFT and Tunewise share, both ways: written here and read there, and back."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.models import tiny, tiny_batch
from tunewise.core.handle import attach
from tunewise.core.recipe import Recipe
from tunewise.delta.dora import DoRA
from tunewise.delta.entries import SparseEntries
from tunewise.delta.existing import ExistingWeights
from tunewise.delta.loha import LoHa
from tunewise.delta.oft import OFT
from tunewise.delta.select_entries import Uniform
from tunewise.head import ClassHead
from tunewise.interop.peft import read_peft, write_peft
from tunewise.interop.peft_forms import FORMS

peft = pytest.importorskip("peft")

LLAMA = ["q_proj", "v_proj", "up_proj", "down_proj"]
DOWN = ["layer.0.output.dense", "layer.1.output.dense"]
SMALL: dict[str, Any] = {"r": 4, "target_modules": LLAMA}
BLOCKS: dict[str, Any] = {"oft_block_size": 8, "target_modules": LLAMA}

# class of PEFT's configuration, model, options
THEIRS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dora": ("LoraConfig", "llama", {**SMALL, "use_dora": True, "rank_pattern": {"up_proj": 2}}),
    "dora, Conv1D": ("LoraConfig", "gpt2", {"use_dora": True, "target_modules": ["c_attn"]}),
    "dora, embedding": (
        "LoraConfig",
        "llama",
        {"use_dora": True, "target_modules": ["embed_tokens", "q_proj"]},
    ),
    "dora, biases": (
        "LoraConfig",
        "bert",
        {"use_dora": True, "target_modules": ["query"], "bias": "lora_only"},
    ),
    "loha": ("LoHaConfig", "llama", {**SMALL, "alpha": 6, "alpha_pattern": {"q_proj": 3}}),
    "loha, ranks": (
        "LoHaConfig",
        "bert",
        {"r": 3, "target_modules": ["query", "key"], "rank_pattern": {"key": 2}},
    ),
    "lokr": ("LoKrConfig", "llama", {**SMALL, "alpha": 5}),
    "lokr, both": ("LoKrConfig", "llama", {**SMALL, "r": 1, "decompose_both": True, "decompose_factor": 16}),
    "vera": ("VeraConfig", "llama", {**SMALL, "projection_prng_key": 3}),
    "vera, drawn": ("VeraConfig", "gpt2", {"r": 5, "target_modules": ["c_attn"], "save_projection": False}),
    "oft": ("OFTConfig", "llama", BLOCKS),
    "oft, exact": ("OFTConfig", "llama", {**BLOCKS, "use_cayley_neumann": False, "block_share": True}),
    "oft, r": ("OFTConfig", "llama", {"r": 4, "oft_block_size": 0, "target_modules": LLAMA}),
    "oft, biases": (
        "OFTConfig",
        "bert",
        {"oft_block_size": 8, "target_modules": ["query"], "bias": "oft_only"},
    ),
    "coft": ("OFTConfig", "llama", {**BLOCKS, "coft": True, "eps": 1e-2}),
    "ia3": ("IA3Config", "bert", {"target_modules": ["key", "value", *DOWN], "feedforward_modules": DOWN}),
    "ia3, head": (
        "IA3Config",
        "bert",
        {"target_modules": ["key"], "feedforward_modules": [], "modules_to_save": ["classifier"]},
    ),
    "ia3, Conv1D": (
        "IA3Config",
        "gpt2",
        {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]},
    ),
    "fourierft": ("FourierFTConfig", "llama", {"n_frequency": 40, "target_modules": LLAMA, "scaling": 90.0}),
    "fourierft, pattern": (
        "FourierFTConfig",
        "gpt2",
        {
            "n_frequency": 40,
            "random_loc_seed": 5,
            "target_modules": ["c_attn", "c_fc"],
            "n_frequency_pattern": {"c_fc": 30},
            "bias": "all",
        },
    ),
    "miss": ("MissConfig", "llama", SMALL),
    "miss, mini": ("MissConfig", "llama", {**SMALL, "init_weights": "mini", "mini_r": 8}),
    "miss, bat": ("MissConfig", "llama", {**SMALL, "init_weights": "bat"}),
    "shira": ("ShiraConfig", "llama", {**SMALL, "r": 2, "random_seed": 1}),
    "norms": ("LNTuningConfig", "bert", {"target_modules": ["LayerNorm"], "modules_to_save": ["classifier"]}),
    "norms, no bias": ("LNTuningConfig", "llama", {"target_modules": ["input_layernorm", "model.norm"]}),
}


def _base(name: str) -> Any:
    """With large weights: at their usual size attention is even, and no change of queries would show."""
    model = tiny(name)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(6.0 if p.dim() > 1 else 1.0)
    return model


def _random(parameters: Any, spread: float = 0.2) -> None:
    make = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn(p.shape, generator=make) * spread)


def _logits(model: Any, name: str) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(**tiny_batch(name)).logits
    return result


def _loaded(name: str, folder: Path) -> Any:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(_base(name), folder).eval()
    assert not [w for w in seen if "missing" in str(w.message).lower()]
    return model


def _theirs(case: str, folder: Path) -> Any:
    config, name, options = THEIRS[case]
    if name == "gpt2":
        options = {**options, **({} if config == "MissConfig" else {"fan_in_fan_out": True})}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(_base(name), getattr(peft, config)(**options)).eval()
        _random([p for p in model.parameters() if p.requires_grad])
        model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("case", THEIRS)
def test_read_gives_pefts_logits_and_writes_what_peft_reads(case: str, tmp_path: Path) -> None:
    name = THEIRS[case][1]
    wanted = _logits(_theirs(case, tmp_path / "a"), name)
    assert float((wanted - _logits(_base(name), name)).abs().max()) > 1e-4
    model = _base(name)
    handle = read_peft(model, tmp_path / "a")
    torch.testing.assert_close(_logits(model, name), wanted, rtol=1e-5, atol=1e-5)

    write_peft(handle, tmp_path / "b")
    torch.testing.assert_close(_logits(_loaded(name, tmp_path / "b"), name), wanted, rtol=1e-5, atol=1e-5)
    a, b = (load_file(tmp_path / x / "adapter_model.safetensors") for x in "ab")
    a = {f"{k}.weight" if k.endswith("lora_magnitude_vector") else k: v for k, v in a.items()}
    extra = {"base_model.vera_A", "base_model.vera_B"} if case == "vera, drawn" else set()
    frozen = {k for k in a if k.endswith("embed_tokens.base_layer.weight")}  # PEFT's copy of the whole table
    assert a.keys() - frozen == b.keys() - extra
    if case != "coft":  # projected when read, as PEFT does it before every use
        for key in a.keys() - frozen:
            torch.testing.assert_close(b[key], a[key], rtol=1e-6, atol=1e-6)


def test_every_kind_is_tested() -> None:
    kinds = {getattr(peft, config)().peft_type.value for config, _, _ in THEIRS.values()}
    assert kinds == set(FORMS)


OURS: dict[str, tuple[str, Any]] = {
    "dora": ("bert", "dora(rank=3, alpha=5)"),
    "dora, sqrt": ("llama", 'dora(rank=3, scaling="sqrt", sites="linear | embedding")'),
    "dora, gpt2": ("gpt2", "dora(rank=3, dropout=0.1)"),
    "loha": ("bert", "loha(rank=3, alpha=7.5)"),
    "lokr": ("llama", "lokr(rank=1, decompose_both=True, factor=4)"),
    "vera": ("bert", "vera(rank=6, seed=3, d_initial=0.3)"),
    "vera, gpt2": ("gpt2", "vera(rank=6)"),
    "oft": ("llama", "oft(block_size=8, terms=0)"),
    "coft": ("bert", "oft(block_size=8, coft=True, eps=100.0)"),
    "ia3": ("llama", "ia3"),
    "ia3, bert": ("bert", "ia3"),
    "ia3, fused rows": ("gpt2", "ia3"),
    "fourierft": ("gpt2", "fourierft(frequencies=20, seed=4)"),
    "fourierft, all": ("llama", "fourierft(frequencies=1500)"),
    "miss": ("bert", "miss(rank=5)"),
    "miss, mini": ("llama", 'miss(rank=4, variant="mini", mini=4)'),
    "miss, bat": ("llama", 'miss(rank=8, variant="bat")'),
    "entries": ("bert", SparseEntries(Uniform(rank=3), sites="query | up")),
    "norms": ("bert", "layernorm_tuning"),
    "norms and head": ("bert", Recipe(delta=ExistingWeights("norm"), head=ClassHead())),
    "norms' biases": ("gpt2", Recipe(delta=ExistingWeights("norm", "bias"))),
    "loha and head": ("bert", Recipe(delta=LoHa(rank=2), head=ClassHead())),
    "pissa": ("llama", "pissa(rank=2)"),
    "olora": ("bert", "olora(rank=2)"),
    "two ranks": ("llama", Recipe(delta=[DoRA(rank=2, sites="query"), DoRA(rank=5, alpha=3.0, sites="mlp")])),
    "two sizes": ("llama", Recipe(delta=[OFT(8, sites="query | up"), OFT(16, sites="down")])),
}


@pytest.mark.parametrize("case", OURS)
def test_peft_loads_what_we_write(case: str, tmp_path: Path) -> None:
    name, method = OURS[case]
    model = _base(name)
    handle = attach(model, method, seed=0)
    _random(handle.parameters(), 0.1)
    wanted = _logits(model, name)
    assert float((wanted - _logits(_base(name), name)).abs().max()) > 1e-4
    write_peft(handle, tmp_path, base_name="somewhere")
    near = 1e-5 * max(1.0, float(wanted.abs().max()))
    torch.testing.assert_close(_logits(_loaded(name, tmp_path), name), wanted, rtol=1e-5, atol=near)
    again = _base(name)
    read_peft(again, tmp_path)
    torch.testing.assert_close(_logits(again, name), wanted, rtol=1e-5, atol=near)
