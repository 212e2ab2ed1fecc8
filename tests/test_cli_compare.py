"""`tunewise compare` and `tunewise report`: what they pass on, print, write and refuse."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

import tunewise as tw
from tests.study.made_up import findings
from tunewise import cli
from tunewise.commands import compare as commands
from tunewise.commands.verdict import verdict_view
from tunewise.core.errors import RunError, UserError
from tunewise.prepare import RowArgs
from tunewise.study.schedule import MEASURE
from tunewise.study.store import Store
from tunewise.study.study import Study

Capture = pytest.CaptureFixture[str]
FACTS = {
    "model": "minilm",
    "data": "reviews",
    "task": "classification",
    "metric": "accuracy",
    "higher_is_better": True,
    "budget": 600.0,
    "prefer": "quality",
    "batch_size": 32,
}


def refused(capsys: Capture, *tokens: str, code: int = 2) -> str:
    """The one sentence on stderr of a command that must end with this exit code."""
    assert cli.run(tokens) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("tunewise: ") and err.count("\n") == 1
    return err.removeprefix("tunewise: ").strip()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def compare(here: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stands in for `tunewise.study.compare`: remembers its arguments, gives `found` or raises `raises`."""
    fake: Any = ModuleType("tunewise.study.compare")
    fake.calls, fake.raises, fake.found = [], None, findings()

    def run(model: str, data: str | None, **options: Any) -> Study:
        fake.calls.append({"model": model, "data": data, **options})
        if fake.raises is not None:
            raise fake.raises
        options["say"]("Text: text.")
        with Store.open(options["out"], {}) as store:
            store.set("plan", ["2 methods.", "  lora(sites=['query'])  at least 3 steps"])
        (options["out"] / "best").mkdir(exist_ok=True)
        (options["out"] / "best" / "run.json").write_text("{}")
        return Study(options["out"], fake.found)

    fake.compare = run
    monkeypatch.setitem(sys.modules, "tunewise.study.compare", fake)
    return fake


def test_every_option_is_one_of_compare(compare: Any) -> None:
    from importlib.util import find_spec

    assert cli.run("compare m d".split()) == 0
    (call,) = compare.calls
    # The fixture stands in for the function itself, so its signature is read from its source.
    spec = find_spec("tunewise.study")
    assert spec is not None and spec.submodule_search_locations is not None
    source = (Path(spec.submodule_search_locations[0]) / "compare.py").read_text(encoding="utf-8")
    known = source[source.index("def compare(") : source.index(") -> Study:")]
    assert all(f"    {name}: " in known or name in RowArgs.__annotations__ for name in call)
    options = cli.app["compare"].assemble_argument_collection()
    mine = {name[2:].replace("-", "_") for a in options for name in a.names if name.startswith("--")}
    assert mine - {"set", "json", "quiet", "model", "data", "dry_run"} | {"options"} <= set(call)
    assert (call["methods"], call["budget"], call["seeds"], call["prefer"]) == (
        "default",
        "10m",
        3,
        "quality",
    )


def test_options_reach_compare(compare: Any) -> None:
    line = "compare m d --budget 1h30m --memory 4GB --seeds 2 --out s --workers 2 --set warmup=0.2 --general g.txt"
    assert cli.run([*line.split(), "--methods", "lora, ia3(sites='key')", "--prefer", "size"]) == 0
    (call,) = compare.calls
    expected = {"methods": "lora, ia3(sites='key')", "prefer": "size", "budget": "1h30m", "memory": "4GB"}
    expected |= {"seeds": 2, "workers": 2, "out": Path("s"), "options": {"warmup": 0.2}, "general": "g.txt"}
    assert {key: call[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("options", "progress"), [("", True), ("--quiet", False), ("--json", False), ("--json -q", False)]
)
def test_nothing_moves_where_it_should_be_quiet(compare: Any, options: str, progress: bool) -> None:
    assert cli.run(f"compare m d {options}".split()) == 0
    assert compare.calls[0]["progress"] is progress


def test_the_same_command_finds_its_study(compare: Any, capsys: Capture, here: Path) -> None:
    assert cli.run("compare m/x d".split()) == 0
    assert "Folder of the study: study-m-x-d " in capsys.readouterr().out
    assert cli.run("compare m/x d".split()) == 0
    assert "Going on with the study in study-m-x-d." in capsys.readouterr().out
    assert [c["out"] for c in compare.calls] == [Path("study-m-x-d")] * 2


@pytest.mark.parametrize(
    ("model", "data", "name"),
    [
        ("minilm", "reviews/amazon", "study-minilm-reviews-amazon"),
        ("../../etc", "a;rm -rf /", "study-etc-a-rm-rf"),
        ("./here", "rows.csv", "study-here-rows"),
        ("/", "…", "study-given-given"),
        ("m" * 300, "d", f"study-{'m' * 40}-d"),
    ],
)
def test_names_of_folders_are_safe(here: Path, model: str, data: str, name: str) -> None:
    (here / "here").mkdir()
    (here / "rows.csv").write_text("")
    assert str(commands.default_folder(model, data)) == name


def test_result_as_text(compare: Any, capsys: Capture) -> None:
    assert cli.run(["compare", "m", "d", "--out", "my study"]) == 0
    out = capsys.readouterr().out
    found = findings()
    for sentence in found["decision"]:
        assert sentence in out
    (lora,) = [text for text in out.splitlines() if text.startswith("lora(rank=8)") and "0.846" in text]
    assert lora.split()[1:6] == ["0.846", "0.829", "to", "0.862", "yes"]
    assert "949 MB  1 min 36 s" in lora and "406 k" in lora and lora.endswith("0.021")
    (dora,) = [text for text in out.splitlines() if text.startswith("dora(rank=8)")]
    assert " yes " not in dora
    for row in found["failed"]:
        assert f"Failed: {row['method']} at lr {row['lr']:g}: {row['reason']}\n" in out
    assert "Report: my study/report.html" in out
    assert "  tunewise predict 'my study/best' rows.csv\n" in out
    assert "  tunewise merge 'my study/best' --out merged\n" in out


def test_quiet_prints_the_result_alone(compare: Any, capsys: Capture) -> None:
    assert cli.run("compare m d -q".split()) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Take lora(rank=8)") and "Report" not in out and err == ""


def test_result_as_json(compare: Any, capsys: Capture) -> None:
    assert cli.run("compare m d --out s --json".split()) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["best"] == "s/best" and found["choice"]["method"] == "lora(rank=8)"
    assert "Text: text." in err


def test_nothing_measured_is_exit_code_1(compare: Any, capsys: Capture) -> None:
    said = "Nothing is decided: no tuned method was measured on test rows."
    compare.found |= {"choice": None, "decision": [said], "metric": "valid/accuracy"}
    assert cli.run("compare m d".split()) == 1
    out, err = capsys.readouterr()
    assert err == f"tunewise: {said}\n" and "tunewise predict" not in out
    compare.raises = RunError("No trial of the study ended well: NaN.")
    assert refused(capsys, *"compare m d -q".split(), code=1) == "No trial of the study ended well: NaN."


def test_stopped_by_hand(compare: Any, capsys: Capture) -> None:
    line = ["compare", "m", "my data", "--methods", "lora(rank=4)", "-q"]
    again = "the same command again goes on: tunewise compare m 'my data' --methods 'lora(rank=4)' -q"
    compare.raises = KeyboardInterrupt("s/report.html")
    assert refused(capsys, *line, code=130) == f"stopped; the report so far is s/report.html; {again}"
    compare.raises = KeyboardInterrupt()
    assert refused(capsys, *line, code=130) == f"stopped; {again}"
    assert refused(capsys, *line, "--dry-run", code=130) == "stopped."


def test_dry_run_leaves_nothing_behind(compare: Any, capsys: Capture, here: Path) -> None:
    assert cli.run("compare m d --dry-run".split()) == 0
    assert list(here.iterdir()) == []
    call = compare.calls[0]
    assert call["dry_run"] is True and not call["out"].exists() and not call["out"].parent.exists()
    assert capsys.readouterr().out == "Text: text.\n"
    assert cli.run("compare m d --dry-run -q".split()) == 0
    assert "  lora(sites=['query'])  at least 3 steps\n" in capsys.readouterr().out
    assert cli.run("compare m d --dry-run --json".split()) == 0
    assert json.loads(capsys.readouterr().out)["plan"][0] == "2 methods."


def test_dry_run_of_a_study_that_is_there_is_its_own(compare: Any, capsys: Capture) -> None:
    assert cli.run("compare m d".split()) == 0
    assert cli.run("compare m d --dry-run".split()) == 0
    assert compare.calls[1]["out"] == Path("study-m-d")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["--budget", "30 parsecs"],
            'The time "30 parsecs" has an unknown unit "parsecs"; did you mean "30 s"?',
        ),
        (["--memory", "4"], 'The memory "4" cannot be read; write "4GB".'),
        (["--prefer", "sizze"], 'Nothing can be preferred by "sizze"; did you mean "size"?'),
        (["--seeds", "0"], "seeds=0 is not valid: at least 1."),
        (["--seeds", "1.5"], 'compare: --seeds takes a whole number, not "1.5".'),
        (["--workers", "0"], "workers=0 is not valid: at least 1."),
        (["--methods", "laddr, full"], 'There is no method "laddr"; did you mean "ladder"?'),
        (["--method", "lora"], 'compare has no option "--method"; did you mean "--methods"?'),
        (["--set", "lr"], '--set takes name=value, not "lr".'),
    ],
)
def test_bad_input_is_one_sentence(capsys: Capture, here: Path, options: list[str], sentence: str) -> None:
    (here / "rows.csv").write_text("text,label\n" + "".join(f"row {i},{i % 2}\n" for i in range(40)))
    assert refused(capsys, "compare", "tiny-roberta", "rows.csv", "-q", *options) == sentence
    assert [p.name for p in here.iterdir()] == ["rows.csv"]


def test_data_is_needed(capsys: Capture) -> None:
    assert refused(capsys, "compare", "m") == "compare needs DATA, or --train with a file of rows."


def test_columns_that_do_not_fit_are_named() -> None:
    found = findings()
    for width in (40, 60, 80, 120, 200):
        out = io.StringIO()
        Console(file=out, width=width, color_system=None).print(verdict_view(found, width))
        text = out.getvalue()
        assert max(map(len, text.splitlines())) <= width
        assert text.count("0.846") >= 2
        assert ("In the report as well" in text) == (width < 200)


def test_an_undecided_study_shows_validation_and_test_scores() -> None:
    rows = [{"method": "lora", "valid/accuracy": 0.8, "front": False}]
    rows += [{"method": "tfidf", "accuracy": 0.7, "accuracy_low": 0.6, "accuracy_high": 0.75, "front": False}]
    out = io.StringIO()
    shown = {"decision": ["Nothing."], "choice": None, "rows": rows, "metric": "valid/accuracy"}
    Console(file=out, width=100, color_system=None).print(verdict_view(shown, 100))
    assert [" ".join(text.split()) for text in out.getvalue().splitlines() if "─" not in text] == [
        "Nothing.",
        "method valid/accuracy accuracy interval",
        "lora 0.800",
        "tfidf 0.700 0.600 to 0.750",
    ]


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Store]:
    """Two measured methods; full is better, lora is smaller. Its writer has not closed it."""
    with Store.open(tmp_path / "study", {}) as store:
        store.set("facts", FACTS)
        for method, value, mb in (("full", 0.9, 80.0), ("lora", 0.8, 2.0)):
            metrics = {"score": value, "valid/accuracy": value}
            tuned = store.start(store.add(method, 1e-3, steps=9, directory=f"trials/{method}").id)
            store.finish(tuned.id, metrics)
            trial = store.add(method, 1e-3, rung=MEASURE, steps=9, directory=f"trials/{method}")
            measured = {"kind": "tuned", "accuracy": value, "accuracy_low": value - 0.01}
            measured |= {"accuracy_high": value + 0.01, "size_mb": mb, "seconds": 9.0, "trainable": 5}
            store.finish(store.start(trial.id).id, {**measured, "peak_memory_mb": 100.0})
            place = store.path(trial)
            (place / "checkpoints").mkdir(parents=True)
            (place / "run.json").write_text(json.dumps({"of": method}))
        store.start(store.add("ia3", 1e-3, steps=9).id)
        yield store


def chosen(store: Store) -> str:
    assert [p.name for p in (store.folder / "best").iterdir()] == ["run.json"]
    return str(json.loads((store.folder / "best" / "run.json").read_text())["of"])


def test_report_beside_the_writer(capsys: Capture, study: Store) -> None:
    assert cli.run(["report", str(study.folder)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Take full at learning rate 0.001.") and "1 trial (ia3)." in out
    assert chosen(study) == "full"
    assert "Take full" in (study.folder / "report.html").read_text(encoding="utf-8")
    study.set("spent", 3.0)


def test_report_with_another_preference(capsys: Capture, study: Store) -> None:
    assert cli.run(["report", str(study.folder), "--prefer", "size", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["choice"]["method"] == "lora" and chosen(study) == "lora"
    assert json.loads((study.folder / "findings.json").read_text())["choice"]["prefer"] == "size"
    assert refused(capsys, "report", str(study.folder), "--prefer", "forgetting").startswith(
        "No row has a measured"
    )
    assert chosen(study) == "lora"
    assert cli.run(["report", str(study.folder), "-q"]) == 0
    assert chosen(study) == "full"


def test_report_of_a_run(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"metrics": {"accuracy": 0.8}, "recipe_name": "lora"}))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    assert cli.run(["report", str(tmp_path)]) == 0
    page = tmp_path / "report.html"
    assert capsys.readouterr().out == f"Report: {page}\n" and "lora" in page.read_text(encoding="utf-8")
    assert "nothing to choose" in refused(capsys, "report", str(tmp_path), "--prefer", "size")


def test_report_of_what_is_no_study(capsys: Capture, study: Store, tmp_path: Path) -> None:
    assert f'did you mean "{study.folder}"?' in refused(capsys, "report", f"{study.folder}y")
    said = f"{tmp_path} is neither a study nor a run: it holds no study.sqlite and no run.json."
    assert refused(capsys, "report", str(tmp_path)) == said
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "study.sqlite").write_text("no database at all, but long enough to be looked at")
    assert "is no study that can be read" in refused(capsys, "report", str(tmp_path / "bad"))
    with Store.open(tmp_path / "early", {}):
        pass
    assert "ended before its first trial" in refused(capsys, "report", str(tmp_path / "early"))


def test_names_of_the_package() -> None:
    import tunewise.study.compare
    import tunewise.study.study

    assert tw.compare is tunewise.study.compare.compare and callable(tw.compare)
    assert tw.Study is tunewise.study.study.Study
    assert {"compare", "Study"} <= set(dir(tw)) & set(tw.__all__)
    with pytest.raises(UserError):
        tw.compare("tiny-roberta", "peptides", budget="soon")
