"""Same tensors, same numbers: PEFT's checkpoints read and written, against PEFT itself."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tunewise as tw
from tests.models import tiny, tiny_batch
from tunewise.core.errors import UserError
from tunewise.core.forward import forward_of
from tunewise.core.handle import Handle, attach
from tunewise.core.recipe import Recipe
from tunewise.delta.existing import ExistingWeights
from tunewise.delta.lora import LoRA
from tunewise.delta.prompt import SoftPrompt
from tunewise.head import ClassHead, PooledHead
from tunewise.interop.peft import read_peft, write_peft

peft = pytest.importorskip("peft")

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {"target_modules": ["query", "value"]}),
    "llama": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "embedding": ("gpt2", {"target_modules": ["c_attn", "transformer.wpe"]}),
    "head": ("bert", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "head and pooler": ("bert", {"target_modules": ["key"], "modules_to_save": ["classifier", "pooler"]}),
    "norm": ("llama", {"target_modules": ["v_proj"], "modules_to_save": ["model.norm"]}),
    "biases of LoRA": ("bert", {"target_modules": ["query"], "bias": "lora_only"}),
    "all biases": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
    "regular expression": ("llama", {"target_modules": r".*layers\.1\.(self_attn|mlp)\..*_proj"}),
    "all linear": ("llama", {"target_modules": "all-linear"}),
    "some layers": ("bert", {"target_modules": ["query"], "layers_to_transform": [1]}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"q_proj": 2, "^model.layers.1.self_attn.v_proj": 3},
            "alpha_pattern": {"layers.0.self_attn.v_proj": 5},
        },
    ),
}


def _random(parameters: list[nn.Parameter]) -> None:
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn(p.shape) * 0.1)


def _logits(model: Any, name: str) -> torch.Tensor:
    result: torch.Tensor = model(**tiny_batch(name)).logits
    return result


def _theirs(name: str, folder: Path, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **options})
        model = peft.get_peft_model(tiny(name), config)
        _random([p for p in model.parameters() if p.requires_grad])
        model.eval().save_pretrained(folder)
    return model


def _loaded(name: str, folder: Path, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(tiny(name), folder, **options).eval()


@pytest.mark.parametrize("case", CASES)
def test_read_gives_pefts_logits_and_gradients_and_writes_the_same_tensors(case: str, tmp_path: Path) -> None:
    name, options = CASES[case]
    theirs = _theirs(name, tmp_path / "a", **options)
    model = tiny(name)
    handle = read_peft(model, tmp_path / "a")
    torch.testing.assert_close(_logits(model, name), _logits(theirs, name), rtol=1e-5, atol=1e-5)

    for one in (model, theirs):
        one(**tiny_batch(name)).loss.backward()
    mine = {k: i.tensor.grad for k, i in handle.tensors().items()}
    assert mine and all(g is not None for g in mine.values())
    other = sorted(float(p.grad.norm()) for p in theirs.parameters() if p.grad is not None)
    torch.testing.assert_close(
        torch.tensor(sorted(float(g.norm()) for g in mine.values() if g is not None)),
        torch.tensor(other),
        rtol=1e-5,
        atol=1e-5,
    )

    write_peft(handle, tmp_path / "b")
    a, b = (load_file(tmp_path / x / "adapter_model.safetensors") for x in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    back = _loaded(name, tmp_path / "b")
    torch.testing.assert_close(_logits(back, name), _logits(theirs, name), rtol=1e-5, atol=1e-5)


OURS: dict[str, tuple[str, Any]] = {
    "bert": ("bert", "lora(rank=3, alpha=5.5)"),
    "llama": ("llama", 'lora(rank=3, scaling="sqrt", sites="linear | head")'),
    "gpt2": ("gpt2", "lora(rank=3)"),
    "embedding": ("llama", 'lora(rank=3, sites="linear | embedding")'),
    "head": ("bert", Recipe(delta=LoRA(rank=2), head=ClassHead())),
    "head without pooler": ("bert", Recipe(delta=LoRA(rank=2, sites="mlp"), head=ClassHead(pooler=False))),
    "biases": ("bert", Recipe(delta=[LoRA(rank=2, sites="query"), ExistingWeights(which="bias")])),
    "biases and head": (
        "bert",
        Recipe(delta=[LoRA(rank=2, sites="query"), ExistingWeights(which="bias")], head=ClassHead()),
    ),
    "layer": ("gpt2", Recipe(delta=[LoRA(rank=2, sites="layers[0] & linear"), ExistingWeights("layers[1]")])),
    "two": ("llama", Recipe(delta=[LoRA(rank=2, sites="query"), LoRA(rank=5, alpha=3.0, sites="mlp")])),
    "mixtral": ("mixtral", 'lora(rank=2, sites="query | value")'),
    "t5": ("t5", 'lora(rank=2, sites="decoder & (query | value)")'),
    "vit": ("vit", Recipe(delta=LoRA(rank=2), head=ClassHead())),
}


@pytest.mark.parametrize("case", OURS)
def test_peft_loads_what_we_write(case: str, tmp_path: Path) -> None:
    name, method = OURS[case]
    model = tiny(name)
    handle = attach(model, method)
    _random(handle.parameters())
    write_peft(handle, tmp_path, base_name="somewhere")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(tiny(name), tmp_path).eval()
    assert not [w for w in seen if "missing" in str(w.message).lower()]
    torch.testing.assert_close(_logits(theirs, name), _logits(model, name), rtol=1e-5, atol=1e-5)
    assert (
        json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "somewhere"
    )
    again = tiny(name)
    read_peft(again, tmp_path, name="again")
    torch.testing.assert_close(_logits(again, name), _logits(model, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("length", [3, 40])
def test_the_fused_product_has_pefts_gradients(name: str, length: int, tmp_path: Path) -> None:
    """Short inputs take two thin products, long ones the dense W + s B A; both have PEFT's gradients."""
    targets = {"bert": ["query", "dense"], "llama": ["q_proj", "up_proj"], "gpt2": ["c_attn", "c_fc"]}[name]
    theirs = _theirs(name, tmp_path, target_modules=targets)
    model = tiny(name)
    handle = read_peft(model, tmp_path)
    batch = tiny_batch(name, length=length)
    for one in (model, theirs):
        one(**batch).loss.backward()
    other = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters()}
    for place, site, t in handle.sites:
        stand_in = forward_of(site.module)
        assert stand_in is not None and (stand_in.plan.product is t) == (name != "gpt2")
        for which in "AB":
            expected = other[f"base_model.model.{site.name}.lora_{which}.weight"]
            torch.testing.assert_close(t.get_parameter(which).grad, expected, rtol=1e-5, atol=1e-6, msg=place)


def test_dropout_is_read_and_acts_in_training_alone(tmp_path: Path) -> None:
    theirs = _theirs("bert", tmp_path, target_modules=["query"], lora_dropout=0.25)
    model = tiny("bert")
    handle = read_peft(model, tmp_path)
    assert [p.dropout for _, p in handle.deltas] == [0.25]  # type: ignore[attr-defined]
    torch.testing.assert_close(_logits(model, "bert"), _logits(theirs, "bert"), rtol=1e-5, atol=1e-5)
    write_peft(handle, tmp_path / "b")
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["lora_dropout"] == 0.25


def test_reading_leaves_the_random_state_alone_and_detaches_bit_equal(tmp_path: Path) -> None:
    _theirs("bert", tmp_path, target_modules=["query"], modules_to_save=["classifier"])
    model = tiny("bert")
    before, state = _logits(model, "bert"), torch.get_rng_state()
    handle = read_peft(model, tmp_path)
    assert torch.equal(state, torch.get_rng_state())
    assert isinstance(handle, Handle) and not torch.equal(_logits(model, "bert"), before)
    handle.detach()
    assert torch.equal(_logits(model, "bert"), before)


@pytest.mark.parametrize(
    ("name", "method", "words"),
    [
        ("phi3", 'lora(sites="query")', "rows query of the fused"),
        ("mixtral", 'lora(sites="experts")', "LoRA on experts"),
        ("bert", "series_adapter", "SeriesAdapter cannot be written as a PEFT checkpoint; keep"),
        (
            "bert",
            "lora + bias_scale",
            "Scale cannot be written as a PEFT checkpoint beside LoRA; export to lora",
        ),
        ("bert", "bias_scale", "keeps no biases beside IA3"),
        ("bert", "head_only", "needs LoRA at one module"),
        ("bert", Recipe(delta=LoRA(rank=2), head=PooledHead(outputs=2)), "new layer of PooledHead"),
        ("bert", Recipe(delta=[LoRA(rank=2), LoRA(rank=3)]), "one LoRA per module"),
        ("bert", Recipe(delta=[LoRA(sites="query"), LoRA(dropout=0.1, sites="key")]), "one dropout for"),
        ("bert", Recipe(delta=[LoRA(sites="key"), ExistingWeights("key", "weight")]), "beside LoRA in one"),
        ("gpt2", Recipe(delta=[LoRA(rank=2), ExistingWeights("embedding")]), "is tied to another module"),
        ("llama", Recipe(delta=[SoftPrompt(tokens=2), LoRA(rank=2)]), "soft prompt alone"),
    ],
)
def test_what_peft_cannot_hold_is_refused(name: str, method: Any, words: str, tmp_path: Path) -> None:
    handle = attach(tiny(name), method)
    with pytest.raises(UserError, match=words):
        write_peft(handle, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, "lacks lora_magnitude_vector of"),
        ({"lora_bias": True}, "uses lora_bias=True"),
        ({"megatron_config": {"a": 1}}, "uses megatron_config"),
        ({"layer_replication": [[0, 1]]}, "uses layer_replication"),
        ({"invented_option": 3}, "uses invented_option=3"),
        ({"peft_type": "BOFT"}, "peft_type='BOFT'"),
        ({"peft_type": "PREFIX_TUNING"}, "uses init_lora_weights=True"),
        ({"peft_type": "LOHA"}, "uses init_lora_weights=True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"r": 5}, r"need \(5, 32\)"),
        ({"alpha_pattern": {"(": 1}}, "no regular expression"),
    ],
)
def test_options_without_an_equal_are_refused_by_name(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    _theirs("bert", tmp_path, target_modules=["query"])
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    model = tiny("bert")
    with pytest.raises(UserError, match=words):
        read_peft(model, tmp_path)
    assert not model.__dict__.get("tw_adaptations")


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="adapter_config.json is missing"):
        read_peft(tiny("bert"), tmp_path)
    _theirs("bert", tmp_path, target_modules=["query"])
    with pytest.raises(UserError, match="is no linear or embedding here"):
        read_peft(tiny("llama"), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_B.weight"
    for change, words in (
        ({name: torch.zeros(3, 4)}, "has the shape"),
        ({name.replace("lora_B.weight", "lora_magnitude_vector"): torch.zeros(32)}, "do not need"),
        ({name.replace("lora_B.weight", "lora_ga_A"): torch.zeros(3)}, "variant of LoRA"),
        ({"base_model.model.bert.encoders.weight": torch.zeros(3)}, "which this model lacks"),
        ({"base_model.model.classifier.weight": torch.zeros(3, 1)}, "has the shape"),
        (
            {"base_model.model.bert.embeddings.word_embeddings.base_layer.weight": torch.zeros(99, 32)},
            "frozen",
        ),
    ):
        save_file({**tensors, **change}, weights)
        with pytest.raises(UserError, match=words):
            read_peft(tiny("bert"), tmp_path)
    save_file({k: v for k, v in tensors.items() if k != name}, weights)
    with pytest.raises(UserError, match="lacks lora_B"):
        read_peft(tiny("bert"), tmp_path)
    weights.write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="is damaged"):
        read_peft(tiny("bert"), tmp_path)
    weights.unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="adapter_model.bin, a pickle"):
        read_peft(tiny("bert"), tmp_path)


def test_names_that_end_alike_are_told_apart(tmp_path: Path) -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(4, 4)
            self.inner = nn.ModuleDict({"proj": nn.Linear(4, 4)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner["proj"](self.proj(x))  # type: ignore[no-any-return]

    model, other = Inner(), Inner()
    other.load_state_dict(model.state_dict())
    handle = attach(model, LoRA(rank=2, sites="re:proj"))
    _random(handle.parameters())
    write_peft(handle, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == "proj"
    x = torch.randn(3, 4)
    expected = model(x)
    theirs = peft.PeftModel.from_pretrained(other, tmp_path).eval()
    torch.testing.assert_close(theirs(x), expected)


def test_restore_says_that_a_folder_is_pefts(tmp_path: Path) -> None:
    write_peft(attach(tiny("llama"), "lora(rank=2)"), tmp_path)
    with pytest.raises(UserError, match="It is a PEFT checkpoint: tw.read_peft attaches it"):
        tw.restore(tiny("llama"), tmp_path)
    assert tw.read_peft(tiny("llama"), tmp_path).trainable
