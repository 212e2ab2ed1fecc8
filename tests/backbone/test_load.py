"""Loading by name: folders, demo names, hub ids, and everything that is refused in words."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import VOCAB, tiny
from tunewise.assets import cache_dir
from tunewise.backbone import backbone_config, load, renew
from tunewise.core.errors import UserError
from tunewise.head import ClassHead, ClozeHead

DEMO = pytest.mark.skipif(
    not list((cache_dir() / "models").glob("tiny-roberta-*/config.json")),
    reason="the demo model is not fetched",
)


def tokenizer(pad: bool = True) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, VOCAB)}}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        **({"pad_token": "<pad>"} if pad else {}),
    }
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def folder(
    path: Path, name: str, *, pad: bool = True, base: bool = False, dtype: torch.dtype | None = None
) -> Path:
    model: Any = tiny(name).base_model if base else tiny(name)
    if dtype is not None:
        model = model.to(dtype)
    if not pad:
        model.config.pad_token_id = model.generation_config.pad_token_id = None
    target = path / name
    model.save_pretrained(target)
    tokenizer(pad).save_pretrained(target)
    return target


def test_base_model_is_what_was_saved(tmp_path: Path) -> None:
    place = folder(tmp_path, "bert")
    model, words = load(place)
    assert type(model).__name__ == "BertModel" and not model.training
    assert words("w5 w6")["input_ids"] == [5, 6]
    saved = tiny("bert").bert.state_dict()  # type: ignore[union-attr,operator]
    assert all(torch.equal(v, saved[k]) for k, v in model.state_dict().items())


def test_labels_and_a_reproducible_classifier(tmp_path: Path) -> None:
    place, notes = folder(tmp_path, "bert", base=True), list[str]()

    def classifier(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        model, _ = load(
            place, auto="sequence_classification", labels=["bad", "good", "so"], note=notes.append
        )
        assert model.config.id2label == {0: "bad", 1: "good", 2: "so"}  # type: ignore[union-attr]
        assert model.config.label2id["good"] == 1 and model.config.num_labels == 3  # type: ignore[union-attr,index]
        return model.classifier.weight  # type: ignore[union-attr,return-value]

    assert torch.equal(classifier(1), classifier(1)) and not torch.equal(classifier(1), classifier(2))
    assert classifier(1).shape == (3, 32)
    assert notes[0] == "New, untrained weights: classifier.bias, classifier.weight."


def test_a_head_of_the_same_size_is_kept_and_one_of_another_is_new(tmp_path: Path) -> None:
    place, notes = folder(tmp_path, "bert"), list[str]()
    model, _ = load(place, auto="sequence_classification", labels=["a", "b"], note=notes.append)
    assert torch.equal(model.classifier.weight, tiny("bert").classifier.weight) and not notes  # type: ignore[union-attr]
    model, _ = load(place, auto="sequence_classification", labels=["a", "b", "c"], note=notes.append)
    assert model.classifier.weight.shape == (3, 32) and "another size" in notes[0]  # type: ignore[union-attr]


def test_regression(tmp_path: Path) -> None:
    model, _ = load(folder(tmp_path, "bert"), auto="sequence_classification", regression=True)
    assert model.config.num_labels == 1 and model.config.problem_type == "regression"  # type: ignore[union-attr]
    assert model(torch.tensor([[4, 5]])).logits.shape == (1, 1)
    with pytest.raises(UserError, match="no labels"):
        load(tmp_path / "bert", regression=True, labels=["a", "b"])


def test_labels_survive_a_save(tmp_path: Path) -> None:
    model, _ = load(folder(tmp_path, "bert"), auto="sequence_classification", labels=["no", "yes"])
    model.save_pretrained(tmp_path / "again")  # type: ignore[operator]
    assert backbone_config(tmp_path / "again" if (tmp_path / "again").exists() else "").label2id == {
        "no": 0,
        "yes": 1,
    }


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_missing_pad_token(tmp_path: Path, name: str) -> None:
    notes = list[str]()
    model, words = load(
        folder(tmp_path, name, pad=False),
        auto="sequence_classification",
        labels=["a", "b"],
        note=notes.append,
    )
    assert words.pad_token == "</s>" and model.config.pad_token_id == 2  # type: ignore[union-attr]
    assert any("no pad token" in n for n in notes)
    rows = words(["w5", "w5 w6 w7"], padding=True, return_tensors="pt")
    logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits
    assert torch.allclose(logits[:1], model(torch.tensor([[5]])).logits, atol=1e-6)


def test_dtypes(tmp_path: Path) -> None:
    half, brain = (
        folder(tmp_path / "h", "bert", dtype=torch.float16),
        folder(tmp_path / "b", "bert", dtype=torch.bfloat16),
    )

    def of(place: Path, dtype: Any = None) -> torch.dtype:
        return next(load(place, dtype=dtype)[0].parameters()).dtype

    assert (of(half), of(half, "float16"), of(brain)) == (torch.float32, torch.float16, torch.bfloat16)
    assert (of(brain, "float32"), of(brain, torch.float64)) == (torch.float32, torch.float64)
    with pytest.raises(UserError, match='no dtype "bfloat61"; did you mean "bfloat16"'):
        of(half, "bfloat61")


def test_meta_has_sizes_and_no_weights(tmp_path: Path) -> None:
    place = folder(tmp_path, "llama")
    (place / "model.safetensors").unlink()
    model, words = load(place, auto="causal_lm", meta=True, dtype="bfloat16")
    assert {p.device.type for p in model.parameters()} == {"meta"} and not model.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in tiny("llama").parameters())
    assert words.pad_token == "<pad>"


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging as transformers_logging

    place, level = folder(tmp_path, "bert", base=True), transformers_logging.get_verbosity()
    capfd.readouterr()
    load(place, auto="sequence_classification", labels=["a", "b"])
    assert capfd.readouterr() == ("", "")
    assert transformers_logging.get_verbosity() == level and level >= logging.DEBUG


def test_image_model_without_its_processor(tmp_path: Path) -> None:
    notes = list[str]()
    tiny("vit").save_pretrained(tmp_path / "vit")  # type: ignore[operator]
    model, processor = load(
        tmp_path / "vit", auto="image_classification", labels=["a", "b"], note=notes.append
    )
    assert processor is None and "without a processor" in notes[0]
    assert model(torch.randn(1, 3, 16, 16)).logits.shape == (1, 2)


def test_language_model_head_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no BertForMaskedLM: cls.predictions"):
        load(folder(tmp_path, "bert"), auto="masked_lm")


def test_weights_of_the_base_must_be_there(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    place = folder(tmp_path, "bert")
    state = load_file(place / "model.safetensors")
    del state["bert.encoder.layer.0.output.dense.weight"]
    save_file(state, place / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"encoder.layer.0.output.dense.weight is missing"):
        load(place, auto="sequence_classification", labels=["a", "b"])
    (place / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match='cannot be loaded as "base"'):
        load(place)


def test_only_safetensors(tmp_path: Path) -> None:
    place = folder(tmp_path, "bert")
    (place / "model.safetensors").unlink()
    torch.save(tiny("bert").state_dict(), place / "pytorch_model.bin")
    with pytest.raises(UserError, match="no model.safetensors"):
        load(place)


def test_no_code_from_the_folder(tmp_path: Path) -> None:
    place = tmp_path / "mine"
    place.mkdir()
    (place / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    auto = {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}
    (place / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": auto}))
    with pytest.raises(UserError, match="Tunewise never runs"):
        load(place)
    assert not (tmp_path / "ran").exists()


def test_shards_stay_inside_the_folder(tmp_path: Path) -> None:
    place = folder(tmp_path, "bert")
    (place / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"bert.pooler.dense.bias": "../outside.safetensors"}}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="outside its folder"):
        load(place)


def test_folders_that_are_no_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "minilm").mkdir()
    with pytest.raises(UserError, match='config.json is missing. To get the demo model, write "demo:minilm"'):
        load("minilm")
    (tmp_path / "minilm" / "run.json").write_text("{}")
    with pytest.raises(UserError, match="holds a Tunewise run"):
        load("minilm")
    (tmp_path / "minilm" / "run.json").rename(tmp_path / "minilm" / "adapter_config.json")
    with pytest.raises(UserError, match="holds a PEFT adapter"):
        load("minilm")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        load("file")
    with pytest.raises(UserError, match="does not exist"):
        load("./nowhere")
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be loaded as a model configuration"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("minilmm", 'cannot be reached .*; did you mean "minilm"'),
        ("someone/model", "no folder and no demo model"),
        ("demo:minilmm", 'There is no demo model "minilmm"; did you mean "minilm"'),
        ("a b", "is no model: expected a folder"),
        ("", "not by ''"),
        (3, "not by 3"),
    ],
)
def test_unknown_names(name: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(name)


def test_unknown_kind() -> None:
    with pytest.raises(UserError, match='no kind of model "causal"; did you mean "causal_lm"'):
        load("minilm", auto="causal")


def test_a_cached_hub_model_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    commit = "0" * 40
    place = tmp_path / "models--someone--model"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    folder(tmp_path, "bert").rename(tmp_path / commit)
    (place / "snapshots").mkdir()
    (tmp_path / commit).rename(place / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    from tunewise.backbone.source import find_source

    found = find_source("someone/model")
    assert (found.place, found.local) == ("someone/model", True)
    (place / "snapshots" / commit / "model.safetensors").unlink()
    assert find_source("someone/model", weights=False).local
    with pytest.raises(UserError, match="cannot be reached"):
        find_source("someone/model")


@DEMO
def test_demo_model() -> None:
    model, words = load("demo:tiny-roberta", auto="masked_lm")
    assert type(model).__name__ == "RobertaForMaskedLM" and words.mask_token == "<mask>"
    config = backbone_config("tiny-roberta")
    assert ClozeHead().auto_for(config) == "masked_lm"
    assert ClassHead().auto_for(config) == "sequence_classification"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", ("sequence_classification", "causal_lm")),
        ("roberta", ("sequence_classification", "masked_lm")),
        ("vit", ("image_classification", "masked_lm")),
    ],
)
def test_which_model_a_head_reads(name: str, expected: tuple[str, str]) -> None:
    config = tiny(name).config
    assert (ClassHead().auto_for(config), ClozeHead().auto_for(config)) == expected


@DEMO
def test_renew_gives_the_weights_that_loading_gives() -> None:
    torch.manual_seed(3)
    fresh, _ = load("tiny-roberta", auto="sequence_classification", labels=["a", "b"])
    after = torch.rand(2)
    torch.manual_seed(4)
    other, _ = load("tiny-roberta", auto="sequence_classification", labels=["a", "b"])
    assert not torch.equal(fresh.classifier.dense.weight, other.classifier.dense.weight)  # type: ignore[union-attr]
    torch.manual_seed(3)
    renew(other)
    assert torch.equal(torch.rand(2), after)  # whatever comes next is drawn alike
    for (name, a), b in zip(fresh.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
