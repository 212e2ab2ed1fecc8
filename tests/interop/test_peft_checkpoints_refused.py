"""What PEFT or Tunewise cannot hold is refused in one sentence, and nothing is left behind."""

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
from tunewise.core.method import read_recipe
from tunewise.core.recipe import Recipe
from tunewise.delta.entries import SparseEntries
from tunewise.delta.existing import ExistingWeights
from tunewise.delta.ia3 import InputScale
from tunewise.delta.loha import LoHa
from tunewise.delta.lokr import LoKr
from tunewise.delta.miss import BlockAffine, MiSS
from tunewise.delta.oft import OFT, ConstrainedOFT
from tunewise.delta.scale import Scale
from tunewise.delta.select_entries import Uniform
from tunewise.delta.spectral import FourierFT
from tunewise.delta.vera import VeRA
from tunewise.interop.peft import read_peft, write_peft

peft = pytest.importorskip("peft")


@pytest.mark.parametrize(
    ("name", "method", "words"),
    [
        ("gpt2", LoHa(rank=2, sites="mlp"), "PEFT has no LoHa for .* which stores its weight"),
        ("gpt2", VeRA(rank=2, sites="query"), "cannot hold VeRA on the rows query of the fused"),
        (
            "llama",
            [LoHa(sites="query"), LoKr(sites="key")],
            "LoKr cannot be written .* beside LoHa; export to",
        ),
        ("llama", [LoHa(sites="query"), LoHa(sites="query")], "one LoHa per module"),
        ("llama", [LoKr(sites="query"), LoKr(factor=4, sites="key")], "one factor for all of LoKr"),
        ("llama", [VeRA(rank=2, sites="query"), VeRA(rank=2, sites="key")], "one pair of projections"),
        ("llama", [OFT(8, sites="query"), OFT(8, terms=7, sites="key")], "one terms for all of OFT"),
        ("llama", [OFT(8, sites="query"), ConstrainedOFT(8, sites="key")], "the constrained form at all"),
        ("llama", [OFT(8, sites="query"), OFT(8, sites="down"), OFT(4, sites="key")], "one block_size for"),
        ("llama", [MiSS(4, sites="query"), BlockAffine(4, sites="key")], "one variant of MiSS"),
        ("llama", [MiSS(4, sites="query"), MiSS(8, sites="key")], "one rank for all of MiSS"),
        ("llama", [FourierFT(9, sites="query"), FourierFT(9, 2.0, sites="key")], "one scale for all of"),
        ("llama", SparseEntries(Uniform(number=50)), r"keeps r \(in \+ out\) entries of every weight"),
        ("llama", SparseEntries(Uniform(rank=2), scale=2.0), "has no factor, and scale is not 1"),
        ("llama", [Scale("down"), InputScale("down")], "one IA3 per module"),
        ("bert", [Scale("query"), ExistingWeights("query", "bias")], "keeps no biases beside IA3"),
        ("bert", "bitfit", "holds no other parameters of the blocks, and"),
        ("bert", "prefix_tuning(tokens=2)", "add ShiftedPositions to the recipe"),
        ("bert", ExistingWeights("query"), "or trained norms; export to hf"),
    ],
)
def test_writing(name: str, method: Any, words: str, tmp_path: Path) -> None:
    handle = attach(tiny(name), Recipe(delta=method) if isinstance(method, list) else method)
    with pytest.raises(UserError, match=words):
        write_peft(handle, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _theirs(config: str, folder: Path, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = getattr(peft, config)(**{"target_modules": ["q_proj"], **options})
        peft.get_peft_model(tiny("llama"), made).save_pretrained(folder)


@pytest.mark.parametrize(
    ("config", "options", "change", "words"),
    [
        ("LoHaConfig", {}, {"r": 5}, r"hada_w1_a of .* has the shape \(32, 8\); .* need \(32, 5\)"),
        ("LoHaConfig", {}, {"alpha": "much"}, "alpha of .* must be a number, not 'much'"),
        ("LoHaConfig", {}, {"invented": 1}, "uses invented=1"),
        ("LoHaConfig", {}, {"rank_pattern": {"(": 1}}, "no regular expression"),
        ("LoKrConfig", {}, {"decompose_factor": 2}, "lokr_w"),
        ("OFTConfig", {"oft_block_size": 8}, {"module_dropout": 0.1}, "uses module_dropout=0.1"),
        ("OFTConfig", {"oft_block_size": 8}, {"block_share": True}, r"need \(1, 28\)"),
        ("VeraConfig", {"r": 4}, {"projection_prng_key": 8}, "is not what its seed .* draws; merge"),
        ("FourierFTConfig", {"n_frequency": 9}, {"random_loc_seed": None}, "coefficients stand is not known"),
        ("MissConfig", {"r": 4}, {"init_weights": "bat"}, r"need \(8, 4, 4\)"),
        ("MissConfig", {"r": 4}, {"init_weights": "bat", "miss_dropout": 0.1}, "has no dropout here"),
        (
            "IA3Config",
            {"feedforward_modules": []},
            {"peft_type": "BOFT"},
            "'BOFT'; of PEFT's adapters LORA, ",
        ),
    ],
)
def test_reading(
    config: str, options: dict[str, Any], change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    _theirs(config, tmp_path, **options)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    model = tiny("llama")
    with pytest.raises(UserError, match=words):
        read_peft(model, tmp_path)
    assert not model.__dict__.get("tw_adaptations")


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    _theirs("LoHaConfig", tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(k for k in tensors if k.endswith("hada_w2_b"))
    for held, words in (
        ({k: v for k, v in tensors.items() if k != key}, "lacks hada_w2_b of model.layers.0"),
        ({**tensors, key.replace("w2_b", "t1"): torch.zeros(2)}, "a variant of LoHa"),
        ({**tensors, "base_model.model.model.norms.hada_w2_b": torch.zeros(2)}, "which is no linear here"),
        ({"base_model.model.model.norm.weight": torch.zeros(32)}, "holds no LoHa tensors"),
        ({**tensors, key: torch.zeros(())}, "a variant of LoHa"),
        ({"hada_w2_b": torch.zeros(2)}, "must start with"),
    ):
        save_file(held, file)
        with pytest.raises(UserError, match=words):
            read_peft(tiny("llama"), tmp_path)


def test_options_that_peft_spells_otherwise_are_named() -> None:
    for text, words in (
        ("fourierft(n_frequency=3)", 'here it is called "frequencies"'),
        ("fourierft(scaling=3)", 'here it is called "scale"'),
        ("vera(projection_prng_key=3)", 'here it is called "seed"'),
        ("oft(oft_block_size=3)", 'here it is called "block_size"'),
        ("lokr(decompose_factor=3)", 'here it is called "factor"'),
        ("dora(lora_alpha=3)", 'here it is called "alpha"'),
        ("lora(use_dora=True)", 'here it is called "--method dora"'),
        ("ia3(feedforward_modules='down')", 'here it is called "inputs"'),
        ("miss(mini_r=3)", 'here it is called "mini"'),
        ("vera(vera_dropout=0.1)", 'here it is called "dropout"'),
    ):
        with pytest.raises(UserError, match=words):
            read_recipe(text)


def test_places_of_entries_are_checked(tmp_path: Path) -> None:
    _theirs("ShiraConfig", tmp_path, r=2)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(k for k in tensors if k.endswith("shira_indices"))
    for wrong in (tensors[key].clamp(max=0), tensors[key] + 32, tensors[key] - 32):
        save_file({**tensors, key: wrong}, file)
        with pytest.raises(UserError, match="are not distinct entries"):
            read_peft(tiny("llama"), tmp_path)


def test_p_tuning_keeps_its_vectors_alone(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.PromptEncoderConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=3,
            encoder_hidden_size=8,
            encoder_reparameterization_type="MLP",
        )
        theirs = peft.get_peft_model(tiny("llama"), config).eval()
        theirs.save_pretrained(tmp_path)
    model = tiny("llama")
    read_peft(model, tmp_path)
    found, wanted = (one(**tiny_batch("llama")).logits for one in (model, theirs))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"invented": 1}))
    with pytest.raises(UserError, match="uses invented=1"):
        read_peft(tiny("llama"), tmp_path)
