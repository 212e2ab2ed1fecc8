"""The command line answers everything with a result or with one sentence and the right exit code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tunewise import cli
from tunewise.commands.console import Output
from tunewise.commands.options import read_options
from tunewise.core.errors import RunError, UserError

Capture = pytest.CaptureFixture[str]


def refused(capsys: Capture, *tokens: str) -> str:
    """The one sentence on stderr of a command that must end with exit code 2."""
    assert cli.run(tokens) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tunewise: ") and err.count("\n") == 1
    return err.removeprefix("tunewise: ").strip()


class FakeResult:
    """What `tune` gives back, as far as the command line looks at it."""

    def __init__(self, **given: Any) -> None:
        self.given = given
        self.metrics = {"accuracy": 0.75, "trainable": 1234, "bad": float("nan")}
        self.directory = given["out"]
        self.plan = {"method": "lora", "calls": {}, "trainable": 5, "total": 10}

    def summary(self) -> dict[str, Any]:
        return {"metrics": self.metrics}


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Stands in for `tunewise.tune`: remembers its arguments, or raises what a test puts into `raises`."""
    fake: Any = ModuleType("tunewise.tune")
    fake.raises, fake.calls = None, []

    def run(model: str, data: str | None, **options: Any) -> FakeResult:
        fake.calls.append({"model": model, "data": data, **options})
        if fake.raises is not None:
            raise fake.raises
        options["say"]("Text: text.")
        return FakeResult(**options)

    fake.tune = run
    fake.predict = lambda folder, rows: [{"id": "a", "prediction": "naïve"}]
    fake.evaluate = lambda folder, data: {"accuracy": 0.5, "data": data}
    fake.merge_run = lambda folder, out: fake.calls.append((folder, out))

    def export_run(folder: Path, to: str, out: Path) -> dict[str, Any]:
        fake.calls.append((folder, to, out))
        return {"relative_error": 0.22, "rank": 16} if to == "lora" else {"relative_error": 0.0}

    fake.export_run = export_run
    monkeypatch.setitem(sys.modules, "tunewise.tune", fake)
    return fake  # type: ignore[no-any-return]


@pytest.fixture
def finished(tmp_path: Path) -> str:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "run.json").write_text("{}")
    return str(tmp_path / "a")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("tun minilm reviews", 'There is no command "tun"; did you mean "tune"?'),
        ("--versio", 'There is no option "--versio"; did you mean "--version"?'),
        ("tune", "tune needs MODEL."),
        ("tune m d", "tune needs --method (for example --method lora; `tunewise methods` lists all)."),
        ("tune m --method lora", "tune needs DATA, or --train with a file of rows."),
        ("tune m d --method", "tune: --method needs a value."),
        ("tune m d --method lora --epoch 3", 'tune has no option "--epoch"; did you mean "--epochs"?'),
        ("tune m d --method lora --epoch=3", 'tune has no option "--epoch"; did you mean "--epochs"?'),
        ("tune m d --learning-rate 3", 'tune has no option "--learning-rate"; here it is called --lr.'),
        (
            "tune m d --r 8 --method lora",
            'tune has no option "--r"; it belongs to the method: --method "lora(rank=...)".',
        ),
        (
            "tune m d --n-frequency 8 --method fourierft",
            'tune has no option "--n-frequency"; it belongs to the method: --method "fourierft(frequencies=...)".',
        ),
        ("tune m d --lr x --method lora", 'tune: --lr takes a number, not "x".'),
        ("tune m d --steps 2.5 --method lora", 'tune: --steps takes a whole number, not "2.5".'),
        ("tune m d extra --method lora", 'tune takes no argument "extra"; see its --help.'),
        ("tune m d --method lora --set lr", '--set takes name=value, not "lr".'),
        ("export run --to peftt --out x", 'export: --to takes peft or lora or hf or tunewise, not "peftt".'),
        ("merge run", "merge needs --out."),
        ("predict run", "predict needs ROWS."),
        ("predict no/such rows.csv", "The run folder no/such does not exist."),
        ("check no-such.csv", 'There is no file or folder "no-such.csv".'),
        ("show laddr", 'There is no method "laddr"; did you mean "ladder"?'),
        ("methods --area lowrang", 'There is no area "lowrang"; did you mean "lowrank"?'),
    ],
)
def test_bad_input_is_one_sentence(capsys: Capture, line: str, sentence: str) -> None:
    assert refused(capsys, *line.split()) == sentence


def test_folder_that_is_no_run(capsys: Capture, tmp_path: Path, finished: str) -> None:
    (tmp_path / "b").mkdir()
    assert "holds no run.json" in refused(capsys, "eval", str(tmp_path / "b"))
    assert f'did you mean "{finished}"' in refused(capsys, "eval", finished + "x")


def test_options_reach_tune(tune: Any) -> None:
    line = "tune m d --method lora --lr 2e-5 --epochs 0.5 --seed 3 --quiet "
    line += "--set warmup=2e-1 --set by-length=false"
    assert cli.run(line.split()) == 0
    call = tune.calls[0]
    assert (call["model"], call["data"], call["method"], call["lr"], call["epochs"], call["seed"]) == (
        "m",
        "d",
        "lora",
        2e-5,
        0.5,
        3,
    )
    assert call["options"] == {"warmup": 0.2, "by_length": False}
    assert call["progress"] is False
    assert call["device"] == "auto" and call["resume"] is False and call["batch_size"] is None


def test_every_option_of_tune_is_passed_on(tune: Any) -> None:
    assert cli.run("tune m d --method lora".split()) == 0
    known = cli.app["tune"].assemble_argument_collection()
    mine = {name[2:].replace("-", "_") for a in known for name in a.names if name.startswith("--")}
    assert mine - {"set", "json", "quiet", "model", "data"} | {"options"} <= set(tune.calls[0])
    assert {"lr", "task", "seed", "skip_bad_rows"} <= mine


def test_json_is_alone_on_stdout(capsys: Capture, tune: Any) -> None:
    assert cli.run("tune m d --method lora --json".split()) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"metrics": {"accuracy": 0.75, "trainable": 1234, "bad": None}}
    assert "Text: text." in err


def test_sentences_and_quiet(capsys: Capture, tune: Any) -> None:
    assert cli.run("tune m d --method lora".split()) == 0
    out = capsys.readouterr().out
    assert "Text: text." in out and "0.75" in out and "1,234" in out
    assert cli.run("tune m d --method lora -q".split()) == 0
    assert "Text" not in capsys.readouterr().out


def test_dry_run_shows_the_plan(capsys: Capture, tune: Any) -> None:
    assert cli.run("tune m d --method lora --dry-run".split()) == 0
    assert "5 of 10 (50.00%)" in capsys.readouterr().out
    assert cli.run("tune m d --method lora --dry-run --json".split()) == 0
    assert json.loads(capsys.readouterr().out)["trainable"] == 5


def test_exit_codes(capsys: Capture, tune: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "tune m d --method lora --out runs/a".split()
    tune.raises = UserError("The column x is missing.")
    assert cli.run(line) == 2
    assert capsys.readouterr().err == "tunewise: The column x is missing.\n"
    tune.raises = RunError("The loss became NaN at step 7.")
    assert cli.run(line) == 1
    assert capsys.readouterr().err == "tunewise: The loss became NaN at step 7.\n"


def test_stopped_by_hand_says_how_to_go_on(capsys: Capture, tune: Any) -> None:
    tune.raises = KeyboardInterrupt()
    assert cli.run(["tune", "m", "my data", "--method", "lora(rank=4)", "--out", "runs/a"]) == 130
    expected = "tunewise tune m 'my data' --method 'lora(rank=4)' --out runs/a --resume\n"
    assert capsys.readouterr().err.endswith(expected)
    assert cli.run("tune m d --method lora".split()) == 130
    assert "--out" in capsys.readouterr().err


def test_unexpected_errors_keep_their_traceback(
    capsys: Capture, tune: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune.raises = ZeroDivisionError("division by zero")
    assert cli.run("tune m d --method lora".split()) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "unexpected ZeroDivisionError: division by zero" in err
    file = re.search(r"traceback is in (\S+);", err)
    assert file is not None
    assert "Traceback (most recent call last)" in Path(file.group(1)).read_text()
    Path(file.group(1)).unlink()
    monkeypatch.setenv("TUNEWISE_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        cli.run("tune m d --method lora".split())


def test_predict_eval_merge_export(capsys: Capture, tune: Any, finished: str, tmp_path: Path) -> None:
    assert cli.run(["predict", finished, "rows.csv"]) == 0
    assert capsys.readouterr().out == '{"id": "a", "prediction": "naïve"}\n'
    target = tmp_path / "p.jsonl"
    assert cli.run(["predict", finished, "rows.csv", "--out", str(target)]) == 0
    assert json.loads(target.read_text(encoding="utf-8"))["prediction"] == "naïve"
    assert "cannot be written" in _second_line(
        capsys, ["predict", finished, "r", "--out", str(tmp_path / "no" / "p")]
    )
    assert cli.run(["eval", finished, "reviews/amazon", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"] == "reviews/amazon"
    assert cli.run(["merge", finished, "--out", "m"]) == 0
    assert cli.run(["export", finished, "--to", "peft", "--out", "p", "--json"]) == 0
    assert tune.calls == [(Path(finished), Path("m")), (Path(finished), "peft", Path("p"))]
    capsys.readouterr()
    assert cli.run(["export", finished, "--to", "lora", "--out", "l"]) == 0
    assert "rank 16 holds the trained change but for a relative error of 0.220" in capsys.readouterr().out


def _second_line(capsys: Capture, tokens: list[str]) -> str:
    capsys.readouterr()
    assert cli.run(tokens) == 2
    return capsys.readouterr().err


def test_set_reads_values_as_yaml() -> None:
    assert read_options(["a=2e-5", "b=true", "c=[1, 2]", "d=x=y"]) == {
        "a": 2e-5,
        "b": True,
        "c": [1, 2],
        "d": "x=y",
    }
    with pytest.raises(UserError, match="twice"):
        read_options(["a=1", "a=2"])


def test_check_counts_rows_and_classes(capsys: Capture) -> None:
    assert cli.run(["check", "reviews", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["train"], found["valid"]) == (10_072, 2_000, 500)
    assert sum(found["classes"].values()) == found["rows"]


def test_methods_and_show(capsys: Capture) -> None:
    assert cli.run(["methods", "--json"]) == 0
    found = {m["name"]: m for m in json.loads(capsys.readouterr().out)}
    assert found["lora"]["area"] == "lowrank" and found["lora"]["formula"]
    assert found["lora"]["options"]["rank"] == 8
    assert cli.run(["methods", "--area", "lowrank"]) == 0
    assert "lora" in capsys.readouterr().out
    assert cli.run(["show", "lora(rank=4)", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["parts"][0]["options"]["rank"] == 4


def test_show_on_a_model_counts_tensors(capsys: Capture) -> None:
    assert cli.run(["show", "lora(rank=4, sites='query')", "--model", "tiny-roberta", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [s["role"] for s in plan["sites"] if s["kind"] == "linear"] == ["query"] * 4
    low_rank = [t for t in plan["tensors"] if "query" in t["name"]]
    assert sum(t["count"] for t in low_rank) == 4 * 4 * (128 + 128)
    assert plan["trainable"] == sum(t["count"] for t in plan["tensors"])


def test_doctor(capsys: Capture) -> None:
    assert cli.run(["doctor", "tiny-roberta", "--json"]) == 0
    found = {f["check"]: f for f in json.loads(capsys.readouterr().out)}
    assert found["model"]["good"] and "linear" in found["model"]["found"]
    assert found["torchvision"]["good"]


def test_quiet_output_says_nothing(capsys: Capture) -> None:
    Output(quiet=True).say("a sentence")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("command", ["", *[name for name in cli.app if not name.startswith("-")]])
def test_help_of_every_command(capsys: Capture, command: str) -> None:
    assert cli.run([*command.split(), "--help"]) == 0
    assert "Usage: tunewise" in capsys.readouterr().out


def test_closed_pipe_is_no_error() -> None:
    shell = f"{sys.executable} -m tunewise check reviews --json -q | head -1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {shell}"], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.returncode == 0
