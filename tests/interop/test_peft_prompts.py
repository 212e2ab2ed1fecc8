"""PEFT's prompts, P-tuning, prefixes and multitask prompts, both ways, with heads, padding and generation."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tunewise as tw
from tests.models import tiny, tiny_batch
from tunewise.core.errors import UserError
from tunewise.core.method import read_recipe
from tunewise.interop.peft import read_peft, write_peft

peft = pytest.importorskip("peft")

TASKS = {"bert": "SEQ_CLS", "llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "qwen3": "CAUSAL_LM"}
KINDS = {
    "prompt": lambda task: peft.PromptTuningConfig(task_type=task, num_virtual_tokens=4),
    "mlp": lambda task: peft.PromptEncoderConfig(task_type=task, num_virtual_tokens=4, encoder_hidden_size=6),
    "lstm": lambda task: peft.PromptEncoderConfig(
        task_type=task, num_virtual_tokens=4, encoder_hidden_size=6, encoder_reparameterization_type="LSTM"
    ),
    "prefix": lambda task: peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=4),
    "projected": lambda task: peft.PrefixTuningConfig(
        task_type=task, num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=6
    ),
    "multitask": lambda task: peft.MultitaskPromptTuningConfig(
        task_type=task, num_virtual_tokens=4, num_tasks=3, num_ranks=2
    ),
}


def theirs(name: str, kind: str, folder: Path | None = None) -> Any:
    """PEFT's model with random tensors, saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny(name), KINDS[kind](TASKS[name])).eval()
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.3)
        if folder is not None:
            model.save_pretrained(folder)
    return model


def loaded(name: str, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(tiny(name), folder).eval()


def batch(name: str, kind: str, padded: bool = True) -> dict[str, Tensor]:
    found = tiny_batch(name)
    if padded:
        found["attention_mask"][1, 6:] = 0
    return found | ({"task_ids": torch.tensor([2, 0])} if kind == "multitask" else {})


def real(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Logits at real tokens; PEFT also answers at a soft prompt's."""
    out = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
    if out.dim() == 2:
        return out  # type: ignore[no-any-return]
    mask = inputs["attention_mask"].bool()
    return out[:, -mask.shape[1] :][mask]  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TASKS)
def test_both_ways(name: str, kind: str, tmp_path: Path) -> None:
    other, inputs = theirs(name, kind, tmp_path / "a"), batch(name, kind)
    handle = read_peft(model := tiny(name), tmp_path / "a")
    wanted = real(other, inputs)
    plain = real(tiny(name), {k: v for k, v in inputs.items() if k != "task_ids"})
    assert (plain - wanted).abs().max() > 1e-3, "PEFT's prompt does nothing"
    torch.testing.assert_close(real(model, inputs), wanted, rtol=1e-5, atol=1e-5)
    write_peft(handle, tmp_path / "b")
    a, b = (load_file(tmp_path / x / "adapter_model.safetensors") for x in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    torch.testing.assert_close(real(loaded(name, tmp_path / "b"), inputs), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["prompt", "prefix", "multitask"])
@pytest.mark.parametrize("name", TASKS)
def test_gradients_are_peft_s(name: str, kind: str, tmp_path: Path) -> None:
    other, inputs = theirs(name, kind, tmp_path), batch(name, kind)
    handle = read_peft(model := tiny(name), tmp_path)
    inputs["labels"] = (
        inputs["labels"].masked_fill(inputs["attention_mask"] == 0, -100)
        if name != "bert"
        else inputs["labels"]
    )
    for one in (model, other):
        one(**inputs).loss.backward()
    encoder = other.prompt_encoder["default"]
    if kind == "prefix":
        grad = encoder.embedding.weight.grad.view(4, 2, 2, -1, 8).permute(1, 2, 3, 0, 4)
        for (_, _, t), (k, v) in zip([s for s in handle.sites if s[2].meta], grad, strict=False):
            torch.testing.assert_close(t.get_parameter("K").grad, k, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(t.get_parameter("V").grad, v, rtol=1e-4, atol=1e-6)
        return
    t = handle.sites[0][2]
    pairs = [("P", encoder.embedding.weight)]
    pairs += [("U", encoder.prefix_task_cols), ("V", encoder.prefix_task_rows)] if kind == "multitask" else []
    for mine, their in pairs:
        torch.testing.assert_close(t.get_parameter(mine).grad, their.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["mlp", "lstm"])
def test_the_network_of_p_tuning_is_peft_s(kind: str) -> None:
    other, inputs = theirs("llama", kind), batch("llama", kind)
    network = "mlp" if kind == "mlp" else "lstm"
    model: Any = tiny("llama")
    handle = tw.attach(model, f'p_tuning(tokens=4, network="{network}", hidden=6)', seed=0)
    encoder, t = other.prompt_encoder["default"], handle.sites[0][2]
    pairs = [("E", encoder.embedding.weight)]
    if kind == "lstm":
        short = {"weight_ih": "x", "weight_hh": "h", "bias_ih": "bx", "bias_hh": "bh"}
        for name, p in encoder.lstm_head.named_parameters():
            start, _, rest = name.partition("_l")
            pairs.append((short[start] + rest.replace("_reverse", "_back"), p))
    linears = [m for m in encoder.mlp_head if isinstance(m, torch.nn.Linear)]
    for i, m in enumerate(linears):
        pairs += [(f"W{i}", m.weight), (f"b{i}", m.bias)]
    with torch.no_grad():
        for mine, their in pairs:
            t.get_parameter(mine).copy_(their)
    torch.testing.assert_close(real(model, inputs), real(other, inputs), rtol=1e-5, atol=1e-5)
    inputs["labels"] = inputs["labels"].masked_fill(inputs["attention_mask"] == 0, -100)
    for one in (model, other):
        one(**inputs).loss.backward()
    assert len(pairs) == len(handle.parameters())
    for mine, their in pairs:
        torch.testing.assert_close(t.get_parameter(mine).grad, their.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "method", ["prefix_tuning(tokens=3, hidden=6)", "p_tuning_v2(tokens=3)", "vpt(tokens=3)"]
)
@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "neox"])
def test_a_prefix_that_moves_no_text_is_turned(name: str, method: str, tmp_path: Path) -> None:
    handle = tw.attach(model := tiny(name), method, seed=0)
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(torch.randn(p.shape) * 0.5)
    write_peft(handle, tmp_path)
    inputs = tiny_batch(name)
    inputs["attention_mask"][1, 6:] = 0
    wanted = real(model, inputs)
    torch.testing.assert_close(real(loaded(name, tmp_path), inputs), wanted, rtol=1e-5, atol=1e-5)
    read_peft(again := tiny(name), tmp_path)
    torch.testing.assert_close(real(again, inputs), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "method",
    ["prompt_tuning(tokens=3) + head_only", "prefix_tuning(tokens=3) + ShiftedPositions(3) + head_only"],
)
def test_a_trained_head_goes_along(method: str, tmp_path: Path) -> None:
    from tunewise.head import ClassHead

    recipe = read_recipe(method.removesuffix(" + head_only")) + ClassHead()
    handle = tw.attach(model := tiny("bert"), recipe, seed=0)
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(torch.randn(p.shape) * 0.3)
    write_peft(handle, tmp_path)
    inputs = batch("bert", "prompt")
    wanted = real(model, inputs)
    torch.testing.assert_close(real(loaded("bert", tmp_path), inputs), wanted, rtol=1e-5, atol=1e-5)
    again = read_peft(other := tiny("bert"), tmp_path)
    torch.testing.assert_close(real(other, inputs), wanted, rtol=1e-5, atol=1e-5)
    assert set(again.existing) == set(handle.existing)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generation_is_peft_s(name: str, kind: str, tmp_path: Path) -> None:
    other = theirs(name, kind, tmp_path)
    read_peft(model := tiny(name), tmp_path)
    ids = torch.randint(3, 90, (2, 5), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = other.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)  # type: ignore[operator]
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("name", "method", "words"),
    [
        ("bert", "prefix_tuning(tokens=3)", "has no rotation that could be undone"),
        ("gpt2", "prefix_tuning(tokens=3)", "position 3, and GPT2LMHeadModel"),
        ("llama", 'prefix_tuning(tokens=3, sites="layers[0] & attention")', "prefixes of all attentions"),
        ("llama", "prefix_tuning(tokens=3) + ShiftedPositions(4)", "behind 3 tokens of prefix"),
        ("llama", "prefix_tuning(tokens=3) + lora", "soft prompt alone"),
        ("llama", 'prompt_tuning(tokens=3, place="after_first")', "not behind the first token"),
        ("roberta", "prompt_tuning(tokens=3)", "not for RobertaForMaskedLM"),
        ("gemma", "prefix_tuning(tokens=3)", "sliding attention drops them"),
    ],
)
def test_what_peft_has_no_place_for(name: str, method: str, words: str, tmp_path: Path) -> None:
    handle = tw.attach(tiny(name), method, seed=0)
    with pytest.raises(UserError, match=words):
        write_peft(handle, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("prompt", {"num_virtual_tokens": 5}, r"prompt_embeddings has the shape \(4, 32\)"),
        ("prefix", {"num_virtual_tokens": 5}, r"prompt_embeddings has the shape \(4, 64\)"),
        ("multitask", {"num_tasks": 2}, "prefix_task_cols has the shape"),
        ("prompt", {"task_type": "SEQ_2_SEQ_LM"}, "task_type CAUSAL_LM, SEQ_CLS"),
        ("prompt", {"num_transformer_submodules": 2}, "of one stack"),
        ("prompt", {"invented": 3}, "uses invented=3"),
        ("prompt", {"peft_type": "MULTITASK_PROMPT_TUNING"}, "lacks prefix_task_cols"),
        ("multitask", {"peft_type": "PROMPT_TUNING"}, "which this model lacks"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    kind: str, change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    theirs("llama", kind, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    model = tiny("llama")
    with pytest.raises(UserError, match=words):
        read_peft(model, tmp_path)
    assert not tw.handles(model)


def test_a_head_of_another_size_is_refused(tmp_path: Path) -> None:
    theirs("bert", "prompt", tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("classifier.weight"))
    save_file(tensors | {name: torch.zeros(3, 32)}, file)
    with pytest.raises(UserError, match=r"has the shape \(3, 32\)"):
        read_peft(tiny("bert"), tmp_path)
