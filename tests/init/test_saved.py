"""A saved adaptation as the start of another: copied exactly, or refused in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.core.toys import run_of, start
from tests.delta.small import moved
from tests.models import tiny
from tunewise.core.errors import UserError
from tunewise.core.handle import attach, restore
from tunewise.init.saved import similarity


def save(method: str, folder: Path, name: str = "bert", move: float = 0.1) -> Any:
    handle = attach(tiny(name), method, seed=0)
    moved(handle, move)
    handle.save(folder)
    return handle


@pytest.mark.parametrize(
    "method",
    [
        "vpt(tokens=3)",
        "lora(rank=2)",
        "prompt_tuning(tokens=3)",
        "vera(rank=4)",
        "random_sparse(share=0.01)",
        "bitfit",
    ],
)
def test_the_second_stage_starts_at_the_saved_tensors(method: str, tmp_path: Path) -> None:
    first = save(method, tmp_path)
    model = tiny("bert")
    before = {n: p.clone() for n, p in model.named_parameters()}
    again = attach(model, f"{method} + FromSaved(path='{tmp_path}')", seed=5)
    wanted = {n: v for n, v in first.state().items() if "classifier" not in n}
    assert {n for n in again.state() if "classifier" not in n} == set(wanted)
    assert all(torch.equal(again.state()[n], v) for n, v in wanted.items())
    plain = attach(tiny("bert"), method, seed=5)
    assert any(not torch.equal(plain.state()[n], v) for n, v in wanted.items())
    again.detach()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_heads_are_left_out_and_a_run_saves_what_it_has_learnt(tmp_path: Path) -> None:
    run = start(run_of("lora(rank=2) + head_only"))
    run.handle.save(tmp_path / "first" / "adaptation")
    second = run_of(f"lora(rank=2) + head_only + FromSaved(path='{tmp_path / 'first'}')")
    mine, theirs = second.handle.tensors(), run.handle.tensors()
    for name, info in mine.items():
        same = torch.equal(info.tensor, theirs[name].tensor)
        assert same is (info.part.slot != "head" and "classifier" not in name and "pooler" not in name), name
    start(second).handle.save(tmp_path / "second")
    moved_on = restore(tiny("bert"), tmp_path / "second")  # the first folder is not needed any more
    assert all(torch.equal(v, second.handle.state()[n]) for n, v in moved_on.state().items())


def test_a_module_crosses_to_the_same_backbone_with_another_head(tmp_path: Path) -> None:
    from transformers import AutoModel

    first = save("lora(rank=2)", tmp_path)
    base = AutoModel.from_config(tiny("bert").config)
    second = attach(base, f"lora(rank=2) + FromSaved(path='{tmp_path}')", seed=5)
    for name, info in second.tensors().items():
        assert torch.equal(info.tensor, first.tensors()[f"bert.{name}"].tensor)


@pytest.mark.parametrize(
    ("saved", "method", "words"),
    [
        ("lora(rank=2)", "lora(rank=3)", r"shape \(2, 32\), and here it is \(3, 32\)"),
        ("vpt(tokens=3)", "vpt(tokens=4)", "shape"),
        ("lora(rank=2)", "dora(rank=2)", "has no tensor"),
        ("lora(rank=2)", "lora(rank=2, sites='query')", "no place"),
        ("lora(rank=2, sites='query')", "lora(rank=2)", "has no tensor"),
    ],
)
def test_what_does_not_fit_is_refused(saved: str, method: str, words: str, tmp_path: Path) -> None:
    save(saved, tmp_path)
    model = tiny("bert")
    with pytest.raises(UserError, match=words):
        attach(model, f"{method} + FromSaved(path='{tmp_path}')")
    assert not model.__dict__["tw_adaptations"]


def test_other_widths_folders_and_lonely_starts_are_refused(tmp_path: Path) -> None:
    save("prompt_tuning(tokens=3)", tmp_path, "gpt2")
    from transformers import GPT2Config, GPT2LMHeadModel

    wide = GPT2LMHeadModel(
        GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=9, bos_token_id=1, eos_token_id=2)
    )
    with pytest.raises(UserError, match="shape"):
        attach(wide, f"prompt_tuning(tokens=3) + FromSaved(path='{tmp_path}')")
    with pytest.raises(UserError, match="holds no adaptation"):
        attach(tiny("bert"), f"lora + FromSaved(path='{tmp_path / 'nowhere'}')")
    with pytest.raises(UserError, match="none beside it"):
        attach(tiny("bert"), f"FromSaved(path='{tmp_path}')")


def test_pvp_and_mvlpt_go_on_from_their_first_stage(tmp_path: Path) -> None:
    for method in ("pvp(tokens=3{})", "mvlpt(tokens=3{})", "prompt_transfer(mode='start', tokens=3{})"):
        folder = tmp_path / method[:3]
        first = save(method.format(""), folder)
        key = "source" if "transfer" in method else "start"
        second = attach(tiny("bert"), method.format(f", {key}='{folder}'"), seed=4)
        prompts = {n for n, i in first.tensors().items() if i.tag == "prompt"}
        assert prompts and all(torch.equal(second.state()[n], first.state()[n]) for n in prompts)


def test_similarity_is_the_cosine_of_mean_prompts(tmp_path: Path) -> None:
    one = save("prompt_tuning(tokens=3)", tmp_path / "a")
    other = save("prompt_tuning(tokens=5)", tmp_path / "b", move=0.3)
    wanted = torch.cosine_similarity(one.sites[0][2].P.mean(0), other.sites[0][2].P.mean(0), dim=0)
    assert abs(similarity(str(tmp_path / "a"), str(tmp_path / "b")) - float(wanted)) < 1e-6
    assert abs(similarity(str(tmp_path / "a"), str(tmp_path / "a")) - 1) < 1e-6
    save("lora(rank=2)", tmp_path / "c")
    with pytest.raises(UserError, match="no prompt"):
        similarity(str(tmp_path / "a"), str(tmp_path / "c"))
