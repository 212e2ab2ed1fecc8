"""Sites of real architectures, tiny and random: roles, layers, stacks, sizes, and no linear forgotten."""

from __future__ import annotations

import re
import time

import pytest
import torch
from torch import nn

from tests.models import NAMES, tiny
from tunewise.sites import Site, find_sites

BERT = {
    "bert.encoder.layer.*.attention.self.query": "query",
    "bert.encoder.layer.*.attention.self.key": "key",
    "bert.encoder.layer.*.attention.self.value": "value",
    "bert.encoder.layer.*.attention.output.dense": "output",
    "bert.encoder.layer.*.intermediate.dense": "up",
    "bert.encoder.layer.*.output.dense": "down",
    "bert.pooler.dense": "pooler",
    "classifier": "head",
}
ALBERT = "albert.encoder.albert_layer_groups.*.albert_layers.*."
T5 = {
    **{
        f"{stack}.block.*.layer.*.SelfAttention.{leaf}": stack
        for stack in ("encoder", "decoder")
        for leaf in "qkvo"
    },
    **{f"decoder.block.*.layer.*.EncDecAttention.{leaf}": "decoder" for leaf in "qkvo"},
}
T5_ROLE = {"q": "query", "k": "key", "v": "value", "o": "output", "wi_0": "gate", "wi_1": "up", "wo": "down"}
TOWER = {
    "self_attn.k_proj": "key",
    "self_attn.v_proj": "value",
    "self_attn.q_proj": "query",
    "self_attn.out_proj": "output",
    "mlp.fc1": "up",
    "mlp.fc2": "down",
}
LLAMA_ATTENTION = {
    "model.layers.*.self_attn.q_proj": "query",
    "model.layers.*.self_attn.k_proj": "key",
    "model.layers.*.self_attn.v_proj": "value",
    "model.layers.*.self_attn.o_proj": "output",
}
EXPECTED: dict[str, dict[str, str]] = {
    "bert": BERT,
    "deberta": {
        **{
            re.sub(r"^bert", "deberta", k)
            .replace("self.query", "self.query_proj")
            .replace("self.key", "self.key_proj")
            .replace("self.value", "self.value_proj"): v
            for k, v in BERT.items()
            if "pooler" not in k
        },
        "pooler.dense": "pooler",
    },
    "albert": {
        "albert.encoder.embedding_hidden_mapping_in": "projection",
        ALBERT + "attention.query": "query",
        ALBERT + "attention.key": "key",
        ALBERT + "attention.value": "value",
        ALBERT + "attention.dense": "output",
        ALBERT + "ffn": "up",
        ALBERT + "ffn_output": "down",
        "albert.pooler": "pooler",
        "classifier": "head",
    },
    "gpt2": {
        "transformer.h.*.attn.c_attn": "qkv",
        "transformer.h.*.attn.c_proj": "output",
        "transformer.h.*.mlp.c_fc": "up",
        "transformer.h.*.mlp.c_proj": "down",
        "lm_head": "head",
    },
    "neox": {
        "gpt_neox.layers.*.attention.query_key_value": "qkv",
        "gpt_neox.layers.*.attention.dense": "output",
        "gpt_neox.layers.*.mlp.dense_h_to_4h": "up",
        "gpt_neox.layers.*.mlp.dense_4h_to_h": "down",
        "lm_head": "head",
    },
    "llama": {
        **LLAMA_ATTENTION,
        "model.layers.*.mlp.gate_proj": "gate",
        "model.layers.*.mlp.up_proj": "up",
        "model.layers.*.mlp.down_proj": "down",
        "lm_head": "head",
    },
    "phi3": {
        "model.layers.*.self_attn.qkv_proj": "qkv",
        "model.layers.*.self_attn.o_proj": "output",
        "model.layers.*.mlp.gate_up_proj": "gate_up",
        "model.layers.*.mlp.down_proj": "down",
        "lm_head": "head",
    },
    "mixtral": {**LLAMA_ATTENTION, "lm_head": "head"},
    "t5": {
        **{name: T5_ROLE[name[-1]] for name in T5},
        **{
            f"{stack}.block.*.layer.*.DenseReluDense.{leaf}": T5_ROLE[leaf]
            for stack in ("encoder", "decoder")
            for leaf in ("wi_0", "wi_1", "wo")
        },
        "lm_head": "head",
    },
    "dinov2": {
        "dinov2.encoder.layer.*.attention.q_proj": "query",
        "dinov2.encoder.layer.*.attention.k_proj": "key",
        "dinov2.encoder.layer.*.attention.v_proj": "value",
        "dinov2.encoder.layer.*.attention.o_proj": "output",
        "dinov2.encoder.layer.*.mlp.fc1": "up",
        "dinov2.encoder.layer.*.mlp.fc2": "down",
        "classifier": "head",
    },
    "clip": {
        **{
            f"{tower}.encoder.layers.*.{leaf}": role
            for tower in ("text_model", "vision_model")
            for leaf, role in TOWER.items()
        },
        "visual_projection": "projection",
        "text_projection": "projection",
    },
    "mamba": {
        **{f"backbone.layers.*.mixer.{leaf}": leaf for leaf in ("in_proj", "x_proj", "dt_proj", "out_proj")},
        "lm_head": "head",
    },
}


def stars(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def by_name(sites: list[Site], kind: str) -> dict[str, Site]:
    return {site.name: site for site in sites if site.kind == kind}


@pytest.mark.parametrize("name", EXPECTED)
def test_linear_roles(name: str) -> None:
    sites = by_name(find_sites(tiny(name)), "linear").values()
    assert {stars(site.name): site.role for site in sites} == EXPECTED[name]


@pytest.mark.parametrize("name", NAMES)
def test_every_linear_is_one_site(name: str) -> None:
    model = tiny(name)
    linears = [
        n for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"
    ]
    sites = find_sites(model)
    assert [site.name for site in sites if site.kind == "linear"] == linears
    assert len(set(sites)) == len(sites)
    assert not [site.name for site in sites if site.role == "other"]
    for site in sites:
        if site.kind == "linear":
            shape = (
                (site.in_features, site.out_features)
                if site.transposed
                else (site.out_features, site.in_features)
            )
            assert site.weight is not None and tuple(site.weight.shape) == shape


@pytest.mark.parametrize("name", NAMES)
def test_blocks_and_sublayers(name: str) -> None:
    sites = find_sites(tiny(name))
    blocks = by_name(sites, "block")
    stacks = {site.stack for site in blocks.values()}
    assert stacks == {
        "t5": {"encoder", "decoder"},
        "bart": {"encoder", "decoder"},
        "whisper": {"encoder", "decoder"},
        "clip": {"text", "vision"},
    }.get(name, {None})
    expected = [0] if name == "albert" else [0, 1]
    for stack in stacks:
        assert [site.layer for site in blocks.values() if site.stack == stack] == expected
    if name != "mamba":
        attentions = len(blocks) + (2 if stacks == {"encoder", "decoder"} else 0)
        assert len(by_name(sites, "attention")) == attentions
        assert len(by_name(sites, "mlp")) == len(blocks)
    for site in sites:
        if site.kind in ("attention", "mlp"):
            assert site.entry is not None and site.exit is not None


def test_sublayer_ends() -> None:
    bert = find_sites(model := tiny("bert"))
    layer = model.bert.encoder.layer[0]
    attention = by_name(bert, "attention")["bert.encoder.layer.0.attention"]
    assert attention.entry is layer.attention and attention.exit is layer.attention.output.dense
    mlp = by_name(bert, "mlp")["bert.encoder.layer.0.output"]
    assert mlp.entry is layer.intermediate.dense and mlp.exit is layer.output.dense
    bart = by_name(find_sites(model := tiny("bart")), "mlp")["model.encoder.layers.0.fc2"]
    assert bart.entry is model.model.encoder.layers[0].fc1 and bart.exit is model.model.encoder.layers[0].fc2
    llama = by_name(find_sites(model := tiny("llama")), "mlp")["model.layers.0.mlp"]
    assert llama.entry is llama.exit is model.model.layers[0].mlp
    assert "model.layers.0.mlp" in by_name(find_sites(tiny("mixtral")), "mlp")
    assert "encoder.block.0.layer.0.SelfAttention" in by_name(find_sites(tiny("t5")), "attention")


def test_experts_are_three_dimensional_parameters() -> None:
    experts = by_name(find_sites(tiny("mixtral")), "experts")
    site = experts["model.layers.0.mlp.experts.gate_up_proj"]
    assert (site.role, site.parameter, site.count, site.in_features, site.out_features) == (
        "gate_up",
        "gate_up_proj",
        4,
        32,
        128,
    )
    assert site.weight is site.module.gate_up_proj and not site.transposed
    assert {role: len(rows) for role, rows in site.roles.items()} == {"gate": 64, "up": 64}
    assert experts["model.layers.1.mlp.experts.down_proj"].role == "down"


def test_embeddings_norms_and_ties() -> None:
    sites = find_sites(tiny("t5"))
    embeddings = by_name(sites, "embedding")
    assert "shared" not in embeddings
    assert embeddings["encoder.embed_tokens"].role == "token"
    assert embeddings["encoder.block.0.layer.0.SelfAttention.relative_attention_bias"].role == "position"
    assert embeddings["decoder.embed_tokens"].stack == "decoder"
    gpt2 = find_sites(tiny("gpt2"))
    assert {n: s.role for n, s in by_name(gpt2, "embedding").items()} == {
        "transformer.wte": "token",
        "transformer.wpe": "position",
    }
    assert by_name(gpt2, "linear")["lm_head"].tied == "transformer.wte"
    assert len(by_name(gpt2, "norm")) == 5
    assert (
        by_name(find_sites(tiny("vit")), "conv")["vit.embeddings.patch_embeddings.projection"].role == "patch"
    )


class NanoBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(8, 24), "c_proj": nn.Linear(8, 8)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(8, 32), "c_proj": nn.Linear(32, 8)})


def test_plain_modules() -> None:
    plain = find_sites(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)))
    assert [(s.name, s.kind, s.role) for s in plain] == [
        ("0", "linear", "other"),
        ("1", "norm", "norm"),
        ("3", "linear", "other"),
    ]
    nano = find_sites(
        nn.ModuleDict({"h": nn.ModuleList([NanoBlock(), NanoBlock()]), "lm_head": nn.Linear(8, 9)})
    )
    assert {s.role for s in nano if s.kind == "linear"} == {"qkv", "output", "up", "down", "head"}
    assert [s.layer for s in nano if s.kind == "block"] == [0, 1]
    torch_encoder = find_sites(
        nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False)
    )
    assert [s.role for s in torch_encoder if s.kind == "linear"] == ["output", "up", "down"] * 2


def test_attachments_are_no_sites() -> None:
    model = tiny("bert")
    before = find_sites(model)
    model.classifier.tw_default = nn.Sequential(nn.Linear(4, 4))
    assert find_sites(model) == before


def test_equality_and_text() -> None:
    first, second = find_sites(tiny("bert")), find_sites(tiny("bert"))
    assert first == second and len({*first, *second}) == len(first)
    assert repr(next(s for s in first if s.role == "head")) == "Site(classifier, linear, head, 32->2)"


def test_fast_on_seven_billion_parameters() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
    start = time.perf_counter()
    sites = find_sites(model)
    assert time.perf_counter() - start < 0.3
    assert len(by_name(sites, "linear")) == 32 * 7 + 1
