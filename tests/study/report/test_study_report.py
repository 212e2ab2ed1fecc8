"""The page of a comparison: everything that was found is on it, nothing on it can harm, and a browser draws it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.study.made_study import ROWS, MadeStudy
from tests.study.made_up import METHODS, findings
from tunewise.core.errors import UserError
from tunewise.study.report.axes import cost_axis
from tunewise.study.report.study_report import write_study_report

EVIL = '<script>alert("x")</script></script><!--<img src=x onerror=alert(1)>\'&{{7*7}}\u2028'
LONG = 'lora(rank=16, alpha=32, sites="query | value | key | mlp_up", dropout=0.05)' * 3
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


class Page(HTMLParser):
    """What a browser would see: tags, addresses, the words outside of scripts and styles, the scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.count: dict[str, int] = {}
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.scripts: list[tuple[str | None, str]] = []
        self.policy = ""
        self._inside: str | None = None
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.count[tag] = self.count.get(tag, 0) + 1
        self.addresses += [values[name] or "" for name in ("src", "href", "xlink:href") if name in values]
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"] or ""
        if tag == "script":
            self.scripts.append((values.get("type"), ""))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            kind, before = self.scripts[-1]
            self.scripts[-1] = (kind, before + data)
        elif self._inside != "style":
            self.words.append(data)

    @property
    def charts(self) -> list[dict[str, Any]]:
        return json.loads(next(text for kind, text in self.scripts if kind == "application/json"))


def hostile() -> dict[str, Any]:
    text = json.dumps(findings())
    for old, new in (("ladder", EVIL), ("bitfit", LONG), ('"accuracy', '"a<b>&c'), ("/accuracy", "/a<b>&c")):
        text = text.replace(old, json.dumps(new)[1:-1] if old.isalpha() else new)
    found: dict[str, Any] = json.loads(text)
    found["title"] = found["command"] = found["choice"]["prefer"] = found["failed"][0]["reason"] = EVIL
    found["notes"].append(EVIL + "x" * 300)
    found["environment"][EVIL] = EVIL
    return found


def undecided() -> dict[str, Any]:
    """Stopped by hand while tuning: leaders on validation rows, baselines on test rows."""
    found = findings()
    rows = [
        {"method": r["method"], "kind": "tuned", "lr": r["lr"], "seeds": 1, "valid/accuracy": r["accuracy"]}
        for r in found["rows"]
        if r["kind"] == "tuned"
    ]
    rows += [{"method": "tfidf", "kind": "baseline", "lr": None, "accuracy": 0.803}]
    settings = [{**s, "lr": None} for s in found["settings"]]
    decision = ["Nothing is decided: no tuned method was measured on test rows."]
    changed = {"metric": "valid/accuracy", "rows": rows, "settings": settings, "decision": decision}
    return {**found, **changed, "choice": None}


def single() -> dict[str, Any]:
    found = findings()
    for key in ("rows", "trials", "settings", "failed"):
        found[key] = [x for x in found[key] if x["method"] == "lora(rank=8)"]
    return found


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("report") / "deep" / "report.html"
    write_study_report(place, findings())
    assert [p.name for p in place.parent.iterdir()] == ["report.html"]
    return place


@pytest.fixture(scope="module")
def page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def hostile_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study_report(tmp_path_factory.mktemp("hostile") / "report.html", hostile())


def test_needs_nothing_and_runs_nothing_else(page: Page, path: Path) -> None:
    assert page.addresses == []
    assert path.stat().st_size < 1.5e6
    own = [text for kind, text in page.scripts if kind is None]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in own]
    assert page.policy == (
        "default-src 'none'; style-src 'unsafe-inline'; script-src "
        + " ".join(f"'sha256-{h}'" for h in hashes)
    )


def test_hostile_content_is_text(page: Page, hostile_path: Path) -> None:
    found = Page(hostile_path.read_text(encoding="utf-8"))
    changed = {tag: n for tag, n in found.count.items() if page.count.get(tag) != n}
    # Names that may be broken in two, one note and one line of the environment more; nothing else.
    assert set(changed) <= {"wbr", "li", "tr", "th", "td"} and "img" not in found.count
    assert found.text.count("<script>alert") >= 5 and "49" not in found.text.split("alert")[1]
    names = [p["value"] for p in found.charts[-1]["params"] if p["name"] == "names"][0]
    assert EVIL in names and LONG in names
    block = hostile_path.read_text(encoding="utf-8").split('id="charts">')[1].split("</script>")[0]
    assert "<" not in block and "\u2028" not in block


def test_everything_found_is_told(page: Page) -> None:
    found = findings()
    for sentence in (*found["decision"], *found["notes"], found["choice"]["sentence"], found["command"]):
        assert sentence in page.text
    assert page.text.index(found["decision"][0]) < page.text.index("Quality against its costs")
    for failure in found["failed"]:
        assert failure["reason"] in page.text
    for row in found["rows"]:
        assert row["command"] is None or row["command"] in page.text
    assert "29 min 1 s of 30 min 0 s" in page.text and "not used : 59 s" in page.text.replace(
        "used:", "used :"
    )
    assert f"All {len(found['trials'])} tuning trials" in page.text


def table(path: Path) -> list[list[str]]:
    body = path.read_text(encoding="utf-8").split('class="wide"')[1].split("</table>")[0]
    rows = re.findall(r"<tr.*?</tr>", body, re.S)
    return [re.findall(r"<t[dh].*?</t[dh]>", row, re.S) for row in rows]


def test_the_table(path: Path) -> None:
    heads, *rows = table(path)
    titles = [re.sub("<.*?>", "", head) for head in heads]
    assert titles[:5] == ["method", "front", "accuracy", "against the best", "against LoRA"]
    assert len(rows) == len(METHODS) + 2 and all(len(row) == len(heads) for row in rows)
    prefix = next(row for row in rows if 'data-value="prefix_tuning(length=20)"' in row[0])
    assert 'data-value=""' in prefix[titles.index("forgetting, nats")], "not measured, so blank and not 0"
    ladder = next(row for row in rows if 'data-value="ladder"' in row[0])
    assert "0.000" in ladder[titles.index("forgetting, nats")]
    best = next(row for row in rows if 'data-value="full"' in row[0])
    assert ">yes<" in best[1] and "0.834 to 0.867" in best[2] and 'data-value=""' in best[3]
    assert "worse" in prefix[3] and "-0.050 (-0.062 to -0.039), p &lt; 0.001" in prefix[3]
    text = path.read_text(encoding="utf-8")
    assert re.findall(r'<tr class="best[^"]*">\s*<td data-value="([^"]*)"', text) == ["lora(rank=8)"]


def test_the_front_of_two(page: Page) -> None:
    memory, *_, forgetting = (chart for chart in page.charts if len(chart["layer"]) > 3)
    points = {p["method"]: p for p in memory["data"]["values"]}
    assert set(points) == set(METHODS), "baselines without a measured memory are no points"
    inside = [n for n, p in points.items() if p["front"]]
    assert set(inside) == {
        *("full", "dora(rank=8)", "lora(rank=8)", "houlsby_adapter(size=32)", "bitfit"),
        *("top_layers(count=2)", "ladder", "linear_probe"),
    }
    assert points["full"]["quality"] == "0.851 (0.834 to 0.867)"
    assert points["full"]["cost"] == "1.9 GB (1,810.37 MiB)"
    assert "prefix_tuning(length=20)" not in {p["method"] for p in forgetting["data"]["values"]}
    assert "Forgetting is not known of tfidf, prefix_tuning(length=20), majority." in page.text
    assert "Outside the chart: majority (0.504)." in page.text


def test_lower_is_better(tmp_path: Path) -> None:
    found = findings()
    for row in found["rows"]:
        row |= {"accuracy": 1 - row["accuracy"], "accuracy_low": None, "accuracy_high": None}
    made = Page(write_study_report(tmp_path / "r.html", {**found, "higher_is_better": False}).read_text())
    assert "Down and left is better." in made.text
    points = {p["method"]: p["front"] for p in made.charts[0]["data"]["values"]}
    assert points["full"] and not points["ia3"]


def test_a_diverging_trial_flattens_no_curve(tmp_path: Path) -> None:
    found = findings()
    trial = next(t for t in found["trials"] if t["method"] == "ia3" and t["lr"] > 0.01)
    for point in trial["curve"]:
        if "loss" in point:
            point["loss"] = 10.0 ** (point["step"] / 50)
    made = Page(write_study_report(tmp_path / "r.html", found).read_text())
    assert max(p["v"] for p in made.charts[-1]["data"]["values"]) < 3
    assert "Values far outside are cut off." in made.text


EMPTY: dict[str, dict[str, Any]] = {
    "nothing": {"metric": "accuracy"},
    "no lists": {
        "metric": "accuracy",
        "rows": None,
        "trials": [],
        "spent": {},
        "choice": None,
        "settings": [],
    },
    "undecided": undecided(),
    "single": single(),
    "no tests": {**findings(), "trials": [], "settings": [], "failed": [], "memory": {}},
}


@pytest.mark.parametrize("name", EMPTY)
def test_what_is_missing_is_left_out(name: str, tmp_path: Path) -> None:
    found = EMPTY[name]
    made = Page(write_study_report(tmp_path / "report.html", found).read_text(encoding="utf-8"))
    assert (found.get("decision") or ["Nothing has been measured."])[0] in made.text
    assert not re.search(r"\b(None|nan|inf|undefined)\b", made.text)
    assert ("What failed" in made.text) == bool(found.get("failed"))
    assert ("Learning curves" in made.text) == bool(found.get("trials"))
    assert ("Quality against its costs" in made.text) == (name == "no tests")
    # The viewer is most of the page: only for those that have something to view.
    assert (made.count.get("svg", 0) > 0) == (len(made.scripts) == 4)


def test_before_a_decision_leaders_and_baselines_are_shown(tmp_path: Path) -> None:
    place = write_study_report(tmp_path / "report.html", undecided())
    heads, *rows = table(place)
    titles = [re.sub("<.*?>", "", head) for head in heads]
    tfidf = next(row for row in rows if 'data-value="tfidf"' in row[0])
    assert 'data-value=""' in tfidf[titles.index("valid/accuracy")]
    assert 'data-value="0.803"' in tfidf[titles.index("accuracy on test rows")]
    lines = Page(place.read_text(encoding="utf-8")).charts[0]["data"]["values"]
    assert any(p["full"] for p in lines), "the leading rate of each method is drawn in full"


def test_what_findings_makes_is_what_the_page_reads(tmp_path: Path) -> None:
    study = MadeStudy(tmp_path / "study")
    for rate, score in ((1e-4, 0.7), (1e-3, 0.9)):
        study.tuned("lora", rate, score)
    study.classified("lora", range(20), inference_seconds=1.5, forgetting=0.02)
    study.classified("full", range(30), rate=1e-5, peak_memory_mb=900.0, trainable=9000)
    study.baseline("majority", range(0, ROWS, 2))
    found = study.find()
    study.store.close()
    place = write_study_report(tmp_path / "report.html", found)
    made = Page(place.read_text(encoding="utf-8"))
    for sentence in found["decision"]:
        assert sentence in made.text
    assert [re.findall('data-value="(.*?)"', row[0])[0] for row in table(place)[1:]] == [
        "lora",
        "full",
        "majority",
    ]
    assert {c["layer"][0]["encoding"]["x"]["title"] for c in made.charts} >= {"peak memory", "training time"}
    assert all(r["command"] in made.text for r in found["rows"] if r["command"])


@pytest.mark.parametrize("key", ["peak_memory_mb", "size_mb", "seconds", "trainable", "forgetting"])
@pytest.mark.parametrize(
    "values",
    [[900, 1800], [1, 1e6], [0, 30, 5e4], [0, 0, 9], [50], [2310, 2330], [1, 3], [12, 7e5], [0, 1e7]],
)
def test_axes_have_a_few_distinct_ticks_inside(values: list[float], key: str) -> None:
    axis = cost_axis(values, key)
    low, high = axis.domain
    assert 2 <= len(axis.ticks) <= 8, axis
    assert all(low <= t * (1 + 1e-9) and t <= high * (1 + 1e-9) for t in axis.ticks), axis
    assert all(0 < axis.place(v) < 1 for v in values)
    assert sorted(axis.ticks) == axis.ticks and len(set(axis.labels)) == len(axis.labels), axis


def test_axes_of_small_and_of_negative_values() -> None:
    assert cost_axis([-0.02, 0.3], "forgetting").labels == ["0", "0.1", "0.2", "0.3"]
    assert cost_axis([0.01, 0.016], "seconds").labels == ["0.01 s", "0.012 s", "0.014 s", "0.016 s"]
    assert cost_axis([5], "trainable").labels == ["5"]
    assert cost_axis([0, 0], "trainable").labels == ["0", "1"]
    assert cost_axis([20, 4000], "seconds").labels == ["30 s", "2 min", "10 min", "1 h"]


def test_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_study_report(tmp_path / "file" / "report.html", {"metric": "accuracy"})


VISIT = """<!doctype html><iframe id="frame" src="report.html" style="width:WIDTHpx;height:4000px"></iframe>
<pre id="told"></pre><script>
const wait = ms => new Promise(done => setTimeout(done, ms));
addEventListener("load", async () => {
  await wait(2000);
  const page = frame.contentDocument, all = selector => [...page.querySelectorAll(selector)];
  const first = () => page.querySelector(".wide tbody td")?.textContent;
  const opacities = () => all(".pane.on .live .mark-symbol path").map(path => path.getAttribute("opacity"));
  const drawn = all(".live svg").length, before = opacities(), top = first();
  all(".tabs button")[3]?.click();
  await wait(1000);
  all(".legend button")[1]?.click();
  await wait(1000);
  const memory = all(".wide th button").find(button => button.textContent === "peak memory");
  memory?.click();
  memory?.click();
  told.textContent = JSON.stringify({
    drawn, after: all(".live svg").length, marks: before.length, faint: opacities().filter(o => o < 0.1).length,
    stills: all(".still").filter(still => still.offsetParent).length, first: top, sorted: first(),
    needs: page.documentElement.scrollWidth, has: page.documentElement.clientWidth,
  });
});
</script>"""


def visit(path: Path, folder: Path, width: int) -> dict[str, Any]:
    """What a browser makes of the page in a frame of this width. It must have nothing to complain about."""
    assert CHROMIUM is not None
    shutil.copy(path, folder / "report.html")
    (folder / "visit.html").write_text(VISIT.replace("WIDTH", str(width)))
    options = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
        *("--allow-file-access-from-files", "--enable-logging=stderr", "--virtual-time-budget=20000"),
        *(f"--user-data-dir={folder / 'profile'}", "--dump-dom", (folder / "visit.html").as_uri()),
    ]
    done = subprocess.run([CHROMIUM, *options], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    told = re.search(r'<pre id="told">(.+?)</pre>', done.stdout)
    assert told is not None, done.stdout[-2000:]
    return json.loads(told.group(1))


@browser
def test_a_browser_draws_it(path: Path, tmp_path: Path) -> None:
    seen = visit(path, tmp_path, 1280)
    assert (seen["drawn"], seen["after"]) == (3, 4), (
        "one pane and two learning curves, then the pane clicked on"
    )
    assert seen["marks"] == len(METHODS) and seen["faint"] == len(METHODS) - 1
    assert seen["stills"] == 0
    assert (seen["first"], seen["sorted"]) == ("full", "linear_probe"), "a second click sorts upwards"


@browser
@pytest.mark.parametrize("name", ["hostile", "undecided", "nothing"])
def test_a_phone_never_scrolls_sideways(name: str, hostile_path: Path, tmp_path: Path) -> None:
    page = hostile_path
    if name != "hostile":
        page = write_study_report(tmp_path / "made.html", EMPTY[name])
    seen = visit(page, tmp_path, 390)
    assert seen["needs"] <= seen["has"] <= 390
    assert seen["drawn"] == {"hostile": 3, "undecided": 2, "nothing": 0}[name]
