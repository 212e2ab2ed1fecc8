"""Names, folders and objects -> rows with stable unique ids."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from tunewise.core.errors import UserError
from tunewise.data import hub, read_rows

LINES = [{"text": f"sentence {i}", "label": i % 2} for i in range(6)]


def jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_ids_are_unique_stable_and_follow_the_content() -> None:
    rows = read_rows([*LINES, LINES[0], LINES[0]])
    ids = [row["id"] for row in rows.rows]
    assert len(set(ids)) == len(ids) == 8
    assert ids[6:] == [f"{ids[0]}-2", f"{ids[0]}-3"]
    assert [row["id"] for row in read_rows([{"text": "new", "label": 0}, *LINES]).rows[1:]] == ids[:6]
    assert ids[0] == "f06a637287733b28"


def test_ids_of_unusual_values_are_stable() -> None:
    rows = [
        {"text": "x", "extra": {1: 2, "b": 3}},
        {"text": "x", "extra": {"p", "q", "r"}},
        {"text": "x", "extra": b"1"},
    ]
    assert len({row["id"] for row in read_rows(rows).rows}) == 3
    assert read_rows(rows).rows[0]["id"] == read_rows([{"extra": {"b": 3, 1: 2}, "text": "x"}]).rows[0]["id"]


def test_own_id_column_is_kept_and_said() -> None:
    rows = read_rows([{"id": 7, "text": "a"}, {"id": 7, "text": "b"}])
    assert [row["source_id"] for row in rows.rows] == [7, 7]
    assert len({row["id"] for row in rows.rows}) == 2
    assert any('"source_id"' in note for note in rows.notes)


def test_hash_is_of_the_content() -> None:
    assert read_rows(LINES).sha256 == read_rows([dict(reversed(row.items())) for row in LINES]).sha256
    assert read_rows(LINES).sha256 != read_rows(LINES[1:]).sha256
    assert len(read_rows(LINES).sha256) == 64


def test_objects_agree() -> None:
    import datasets
    import pandas

    frame = pandas.DataFrame(LINES)
    data = datasets.Dataset.from_list(LINES)
    assert read_rows(frame).sha256 == read_rows(data).sha256 == read_rows(LINES).sha256


def test_missing_values_of_pandas_are_none() -> None:
    import pandas

    frame = pandas.DataFrame({"text": ["a", None], "label": [math.nan, 1.0], "day": [pandas.NaT, pandas.NaT]})
    rows = read_rows(frame).rows
    assert rows[0]["label"] is None and rows[1]["text"] is None and rows[0]["day"] is None
    assert rows[1]["label"] == 1.0


def test_dataset_dict_with_class_names() -> None:
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    part = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, -1]}, features=features)
    found = read_rows(datasets.DatasetDict(train=part, validation=part, unsupervised=part))
    assert found.splits is not None and list(found.splits) == ["train", "valid"]
    assert [row["label"] for row in found.splits["train"]] == ["no", "yes", None]
    assert any('not used: "unsupervised" (3 rows)' in note for note in found.notes)
    assert len(found.rows) == 6 and len({row["id"] for row in found.rows}) == 6


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (3, "data is of type int"),
        ([1], r"data\[0\] is of type int"),
        ([], "no rows"),
        ({"text": ["a"]}, 'key "text"'),
        ({"test": LINES}, "no train set"),
    ],
)
def test_wrong_objects(data: object, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        read_rows(data)


def test_folder_with_sets(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", LINES[:4])
    jsonl(tmp_path / "dev.jsonl", LINES[4:])
    (tmp_path / "README.md").write_text("about")
    rows = read_rows(tmp_path)
    assert rows.splits is not None
    assert {name: len(part) for name, part in rows.splits.items()} == {"train": 4, "valid": 2}
    assert all(any(row is kept for kept in rows.rows) for row in rows.splits["valid"])
    assert any("not read: README.md" in note for note in rows.notes)


def test_dict_of_paths_equals_the_folder(tmp_path: Path) -> None:
    train, dev = jsonl(tmp_path / "train.jsonl", LINES[:4]), jsonl(tmp_path / "dev.jsonl", LINES[4:])
    assert (
        read_rows({"train": train, "valid": str(dev)}).splits
        == read_rows({"train": LINES[:4], "valid": LINES[4:]}).splits
    )


def test_folder_of_parts_is_joined(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", LINES[:4])
    jsonl(tmp_path / "b.jsonl", LINES[4:])
    rows = read_rows(tmp_path)
    assert rows.splits is None and rows.sha256 == read_rows(LINES).sha256
    jsonl(tmp_path / "c.jsonl", [{"other": 1}])
    with pytest.raises(UserError, match="differ in the columns"):
        read_rows(tmp_path)


def test_folder_that_mixes_sets_and_parts_is_refused(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", LINES)
    jsonl(tmp_path / "more.jsonl", LINES)
    with pytest.raises(UserError, match='mixes sets .*"more"'):
        read_rows(tmp_path)


def test_empty_folder_and_links_out_of_it(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    with pytest.raises(UserError, match="it is empty"):
        read_rows(inside)
    os.symlink(jsonl(tmp_path / "secret.jsonl", LINES), inside / "train.jsonl")
    with pytest.raises(UserError, match="leads out of the folder"):
        read_rows(inside)


def test_saved_datasets(tmp_path: Path) -> None:
    import datasets

    part = datasets.Dataset.from_list(LINES)
    part.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=part, test=part).save_to_disk(str(tmp_path / "two"))
    assert read_rows(tmp_path / "one").sha256 == read_rows(LINES).sha256
    assert list(read_rows(tmp_path / "two").splits or {}) == ["train", "test"]
    state = tmp_path / "one" / "state.json"
    changed = json.loads(state.read_text()) | {"_data_files": [{"filename": "../two/train/data.arrow"}]}
    state.write_text(json.dumps(changed))
    with pytest.raises(UserError, match="leads out of the folder"):
        read_rows(tmp_path / "one")


def test_a_path_wins_over_a_demo_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reviews").mkdir()
    jsonl(tmp_path / "reviews" / "a.jsonl", LINES)
    assert len(read_rows("reviews")) == 6
    assert len(read_rows("demo:reviews")) == 10_072


def test_missing_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_reachable", lambda: False)
    jsonl(tmp_path / "train.jsonl", LINES)
    with pytest.raises(UserError, match='did you mean ".*train.jsonl"'):
        read_rows(str(tmp_path / "trian.jsonl"))
    with pytest.raises(UserError, match="There is no folder"):
        read_rows(str(tmp_path / "nowhere" / "a.csv"))
    with pytest.raises(UserError, match='cannot be reached .* did you mean "reviews"'):
        read_rows("revews")
    with pytest.raises(UserError, match="is empty"):
        read_rows("")
    with pytest.raises(UserError, match='no demo data set "reviws"; did you mean "reviews"'):
        read_rows("demo:reviws")
