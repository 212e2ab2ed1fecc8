"""What README and CONTRIBUTING show runs as it stands."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

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


def measured() -> list[tuple[str, str]]:
    """(row of README's table, what the result file says)."""
    folder = ROOT / "benchmarks" / "results"
    read = {f.stem: json.loads(f.read_text(encoding="utf-8")) for f in folder.glob("*.json")}
    reviews, gsm, peft = read["reviews"]["summary"], read["gsm8k"], read["lora_vs_peft"]["rows"]
    repeats = read["compare_reviews"]["repeats"]
    chosen, regret = [r["accuracy"][0] for r in repeats], [r["regret"][0] for r in repeats]
    return [
        ("`compare minilm reviews", f"{min(chosen):.3f} to {max(chosen):.3f}"),
        ("the same: what a long search", f"{min(regret):.3f} to {max(regret):.3f}"),
        ("LoRA on `reviews`", f"{reviews['lora']['accuracy']:.3f}"),
        ("full fine-tuning", f"{reviews['full']['accuracy']:.3f}"),
        ("linear probe", f"{reviews['linear_probe']['accuracy']:.3f}"),
        ("30 steps", f"{gsm['before']:.2f} to {gsm['after']:.2f}"),
        ("LoRA training step", f"{peft[0]['ratio']:.2f}"),
        ("the same with dropout", f"{peft[1]['ratio']:.2f}"),
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
