"""What README and CONTRIBUTING show runs as it stands."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tunewise import cli

ROOT = Path(__file__).parent.parent


def blocks(file: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / file).read_text(encoding="utf-8"), re.S | re.M)


def commands() -> list[str]:
    lines = [
        line
        for file in ("README.md", "CONTRIBUTING.md")
        for b in blocks(file, "bash")
        for line in b.splitlines()
    ]
    return [line for line in lines if line.startswith("tunewise")]


def test_python_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = blocks("README.md", "python")
    assert 8 <= len([line for line in example.splitlines() if line.strip()]) <= 12
    exec(compile(example, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert re.match(r"0\.\d+ runs/peptides\n\[\{", out), out
    assert (tmp_path / "runs" / "peptides" / "report.html").is_file()
    assert (tmp_path / "adaptation" / "adaptation.safetensors").is_file()


@pytest.mark.parametrize("command", commands())
def test_commands_are_understood(command: str) -> None:
    function, bound, _ = cli.app.parse_args(shlex.split(command)[1:], exit_on_error=False, print_error=False)
    assert callable(function) and bound is not None


STEPS = [
    ("LoRA on `minilm`", "lora"),
    ("LoRA with dropout 0.1 on `minilm`", "lora dropout"),
    ("DoRA on `minilm`", "dora"),
    ("DoRA with dropout 0.1 on `minilm`", "dora dropout"),
    ("LoHa on `minilm`", "loha"),
    ("LoKr on `minilm`", "lokr"),
    ("FourierFT on `minilm`", "fourierft"),
    ("LoRA on `smollm2`", "decoder lora"),
    ("LoRA in bfloat16 on `smollm2`", "decoder lora bf16"),
    ("DoRA on `smollm2`", "decoder dora"),
]


DATA, KEYS = ("reviews", "peptides"), ("accuracy", "regret")


def span(repeats: list[dict[str, Any]], key: str) -> str:
    values = [repeat[key][0] for repeat in repeats]
    return f"{min(values):.3f} to {max(values):.3f}"


def measured() -> list[tuple[str, str]]:
    """(row of README's table, what the result file says)."""
    folder = ROOT / "benchmarks" / "results"
    read = {f.stem: json.loads(f.read_text(encoding="utf-8")) for f in folder.glob("*.json")}
    reviews, gsm, steps = read["reviews"]["summary"], read["gsm8k"], read["steps_vs_peft"]["rows"]
    accuracy, regret = ([span(read[f"compare_{data}"]["repeats"], key) for data in DATA] for key in KEYS)
    return [
        ("`compare minilm reviews", accuracy[0]),
        ("the same: what a long search", regret[0]),
        ("`compare tiny-roberta peptides", f"{accuracy[1]}; {regret[1]}"),
        ("LoRA on `reviews`", f"{reviews['lora']['accuracy']:.3f}"),
        ("full fine-tuning", f"{reviews['full']['accuracy']:.3f}"),
        ("linear probe", f"{reviews['linear_probe']['accuracy']:.3f}"),
        ("30 steps", f"{gsm['before']:.2f} to {gsm['after']:.2f}"),
        ("a training step of LST", f"{read['side']['memory']['of_lora']['lst']['ours']:.2f}"),
        ("the second epoch of LST", f"{read['side']['lst']['runs']['folder']['second_epoch']:.2f}"),
        ("bfloat16 instead of float32", f"{read['half']['ways']['bfloat16']['minus_float32'][0]:.4f}"),
        *((name, f"{steps[key]['time']:.2f} | {steps[key]['memory']:.2f}") for name, key in STEPS),
    ]


@pytest.mark.parametrize(("row", "value"), measured())
def test_numbers_come_from_result_files(row: str, value: str) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {row}")]
    assert f"| {value} |" in line


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    for file in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / file).read_text(encoding="utf-8")
        assert set(re.findall(r"`make (\w+)|^make (\w+)", text, re.M)), file
        named = {a or b for a, b in re.findall(r"`make (\w+)|^make (\w+)", text, re.M)}
        assert named <= targets


def test_method_of_contributing_works(tmp_path: Path) -> None:
    import torch

    import tunewise as tw

    (code,) = blocks("CONTRIBUTING.md", "python")
    assert len([line for line in code.splitlines() if line.strip()]) < 40
    (tmp_path / "mine.py").write_text(code, encoding="utf-8")
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    x = torch.randn(4, 3)
    before = model(x)
    handle = tw.attach(model, f"{tmp_path}/mine.py:rank_one_scale")
    assert handle.trainable == 3 + 2
    assert torch.equal(model(x), before)
    with torch.no_grad():
        handle.parameters()[0].fill_(0.5)
    tuned = model(x)
    assert torch.allclose(tuned, x @ (model[0].weight * 1.5).T + model[0].bias, atol=1e-6)
    handle.merge()
    assert torch.allclose(model(x), tuned, atol=1e-6)
