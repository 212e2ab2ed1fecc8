"""The report is one page that needs nothing else, and whatever it shows is escaped."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tunewise.core.errors import UserError
from tunewise.study.report.run_report import run_report, write_report

EVIL = '<script>alert("x")</script>'


def row(name: str, accuracy: float, **more: Any) -> dict[str, Any]:
    return {
        "method": name,
        "accuracy": accuracy,
        "accuracy_low": accuracy - 0.01,
        "accuracy_high": accuracy + 0.01,
        **more,
    }


ROWS = [
    row("majority", 0.5, trainable=0, seconds=0.0001),
    row("lora", 0.835, trainable=405_000, seconds=95.0, peak_memory_mb=900.0, size_mb=1.6),
    row("full", 0.84, trainable=22_700_000, seconds=130.0, peak_memory_mb=1800.0, size_mb=87.0),
    row(EVIL, 0.7, trainable=900, seconds=30.0),
]
RUNS = [
    {
        "name": name,
        "metrics": [{"step": s, "loss": 1 / s, "lr": 1e-3} for s in range(1, 60)]
        + [{"step": s, "valid/accuracy": 0.5 + s / 200} for s in (20, 40, 60)],
        "settings": {"lr": 1e-3, "model": {"name": EVIL}},
    }
    for name in ("lora", "full", EVIL)
]


class Tags(HTMLParser):
    """Counts tags and collects addresses, as a browser would see them."""

    def __init__(self) -> None:
        super().__init__()
        self.count: dict[str, int] = {}
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "deep" / "report.html"
    notes = [f"a note {EVIL}"]
    write_report(path, ROWS, RUNS, notes, title=f"t {EVIL}", command=f"tunewise {EVIL}")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


def test_needs_nothing_from_outside(page: str) -> None:
    tags = Tags()
    tags.feed(page)
    assert tags.addresses == []
    assert "default-src 'none'" in page
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) == {"http://www.w3.org/2000/svg"}
    assert "@import" not in page and "url(" not in page.replace("url(#", "")


def test_escapes_everything(page: str) -> None:
    tags = Tags()
    tags.feed(page)
    assert tags.count["script"] == 1
    assert "alert(&#34;x&#34;)" in page
    assert EVIL not in page


def test_verdict_table_and_charts(page: str) -> None:
    verdict = re.search(r'class="verdict">(.*?)</p>', page, re.S)
    assert verdict is not None
    assert "full has the highest accuracy: 0.840 (0.830 to 0.850)." in verdict.group(1)
    assert "lora reaches 0.835, too close to tell the two apart" in verdict.group(1)
    body = page.split("<tbody>")[1].split("</tbody>")[0]
    assert body.count("<tr") == len(ROWS)
    assert body.count('class="best"') == 1
    assert page.count("<figure>") == 4
    assert page.count("<svg") == 4 + 3, "four charts and a swatch for every name that is drawn"
    assert "#010203" not in page, "ink takes the colour of the page, so that dark mode works"


def test_every_row_is_sortable(page: str) -> None:
    values = re.findall(r'<td class="number" data-value="([^"]*)"', page)
    assert len(values) == 5 * len(ROWS)
    assert all(v == "" or float(v) >= 0 for v in values)


def test_report_of_a_run(tmp_path: Path) -> None:
    run = {
        "format": 1,
        "identity": {
            "model": {"name": "minilm"},
            "seed": 3,
            "task": {"task": "classification", "metric": "accuracy"},
            "settings": {"lr": 1e-3, "batch_size": 32, "steps": None, "warmup": 0.1},
        },
        "data": {"name": "reviews", "notes": ["Text: text."]},
        "environment": {"torch": "2"},
        "recipe_name": "lora(rank=8)",
        "metrics": {"valid/accuracy": 0.8, "seconds": 3.0, "trainable": 10, "steps": 4},
    }
    (tmp_path / "run.json").write_text(json.dumps(run))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in RUNS[0]["metrics"]))
    text = run_report(tmp_path).read_text(encoding="utf-8")
    assert "lora(rank=8) reaches valid/accuracy 0.800." in text
    command = "tunewise tune minilm reviews --method &#39;lora(rank=8)&#39; --seed 3 --lr 0.001 "
    assert command + "--batch-size 32 --set warmup=0.1" in text
    assert "Text: text." in text


@pytest.mark.parametrize("content", [None, "{"])
def test_run_without_readable_record(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
        (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=r"run\.json cannot be read|not valid JSON"):
        run_report(tmp_path)


def test_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_report(tmp_path / "file" / "report.html", ROWS)


def test_rows_without_the_metric(tmp_path: Path) -> None:
    text = write_report(
        tmp_path / "r.html", [{"method": "a"}, {"method": "b", "accuracy": float("nan")}]
    ).read_text()
    assert "No run has a measured accuracy." in text
    assert "nan" not in text.split("<tbody>")[1].split("</tbody>")[0]
