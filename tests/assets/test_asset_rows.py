"""The index and the demo rows that ship with the package or are small to fetch."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tunewise.assets import DATA, MODELS, cache_dir, demo_rows, fixed_splits, model_path
from tunewise.core.errors import UserError


def test_every_entry_is_complete() -> None:
    assert set(MODELS) == {"minilm", "smollm2", "tiny-roberta", "dinov2-small"}
    for asset in (*MODELS.values(), *DATA.values()):
        assert asset.licence and asset.description and asset.version and asset.file
        assert re.fullmatch("[0-9a-f]{64}", asset.sha256) and re.fullmatch("[0-9a-f]{64}", asset.archive)


def test_importing_is_light() -> None:
    code = "import sys, tunewise.assets, tunewise.data; print({'torch', 'transformers', 'pandas'} & set(sys.modules))"
    env_path = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=env_path
    )
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("name", "count", "positive"),
    [
        ("reviews", 10_072, 4_996),
        ("reviews/amazon", 2_985, 1_750),
        ("reviews/tweets", 3_432, 2_345),
        ("reviews/nyt", 2_970, 1_187),
    ],
)
def test_reviews_ship_with_the_package(
    name: str, count: int, positive: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNEWISE_CACHE", str(tmp_path / "cache"))
    rows = demo_rows(name)
    assert len(rows) == count and not (tmp_path / "cache").exists()
    assert all(abs(row["rating"]) >= 0.5 and row["text"].strip() for row in rows)
    assert all((row["label"] == "positive") == (row["rating"] > 0) for row in rows)
    assert Counter(row["label"] for row in rows) == {"positive": positive, "negative": count - positive}


def test_fixed_splits() -> None:
    splits = fixed_splits("reviews")
    assert splits is not None and splits == (2000, 500) and splits.train == 2000
    with pytest.raises(UserError, match='did you mean "reviews"'):
        fixed_splits("reviewz")


def test_wrong_names_and_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match='no demo model "minlm"; did you mean "minilm"'):
        model_path("minlm")
    monkeypatch.setenv("TUNEWISE_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("TUNEWISE_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "tunewise"


def test_peptides_are_fetched() -> None:
    rows = demo_rows("peptides")
    assert Counter(row["label"] for row in rows) == {"AMP": 2600, "UniProt": 2600}
    assert rows[0]["sequence"] == "GLWSKIKEVGKEAAKAAAKAAGKAALGAVSEAV"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count", "columns"),
    [
        ("gsm8k", 1319, ["question", "answer", "final"]),
        ("bbc", 2225, ["id", "title", "text", "label"]),
    ],
)
def test_fetched_data(name: str, count: int, columns: list[str]) -> None:
    rows = demo_rows(name)
    assert len(rows) == count and list(rows[0]) == columns
    assert all(all(str(value).strip() for value in row.values()) for row in rows)
