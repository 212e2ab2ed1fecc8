"""Files of every format: what is detected is said, what is bad is named by its line, nothing is dropped
silently.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunewise.core.errors import UserError
from tunewise.data import read_rows


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


@pytest.mark.parametrize(
    ("delimiter", "word"), [(",", "comma"), (";", "semicolon"), ("\t", "tab"), ("|", "bar")]
)
def test_csv_delimiter_is_found_and_said(tmp_path: Path, delimiter: str, word: str) -> None:
    lines = [("text", "label"), ('"one, two"', "a"), ("three", "b")]
    rows = read_rows(write(tmp_path / "a.csv", "\n".join(delimiter.join(line) for line in lines)))
    assert [row["text"] for row in rows.rows] == ["one, two", "three"]
    assert f"{word}-separated" in rows.notes[0] and "2 rows" in rows.notes[0]


def test_csv_numbers_are_converted_and_codes_are_not(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path / "a.csv", "n,x,code,gap\n1,2.5,007,3\n-4,1e3,123,\n"))
    assert [{k: v for k, v in row.items() if k != "id"} for row in rows.rows] == [
        {"n": 1, "x": 2.5, "code": "007", "gap": 3},
        {"n": -4, "x": 1000.0, "code": "123", "gap": None},
    ]
    assert "(numbers: n, x, gap)" in rows.notes[0]


def test_quoted_newlines_bom_and_crlf(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path / "a.csv", b'\xef\xbb\xbftext,label\r\n"a\r\nb",x\r\n\r\nc,y\r\n'))
    assert rows.columns == ["text", "label"]
    assert [row["text"] for row in rows.rows] == ["a\r\nb", "c"]


def test_utf16(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path / "a.csv", "text,label\nçay,x\nsu,y\n".encode("utf-16")))
    assert rows.rows[0]["text"] == "çay" and "UTF-16" in rows.notes[0]


def test_tsv_with_lone_quotes(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path / "a.tsv", 'text\tlabel\n"Hi there\tx\nplain\ty\n'))
    assert [row["text"] for row in rows.rows] == ['"Hi there', "plain"]
    assert "quote marks read as text" in rows.notes[0]


BAD = {
    "a.csv": (
        b"text,label\none,a\ntwo\nthree,b\nfour,b,c\n",
        ["line 3: 1 field, expected 2", "line 5: 3 fields"],
    ),
    "b.csv": (b"text,label\none,a\ncaf\xe9,b\ntwo,b\n", ["line 3: bytes that are not UTF-8"]),
    "c.csv": (b'text,label\none,a\n"two" x,b\nthree,b\n', ["line 3: broken quoting"]),
    "d.jsonl": (
        b'{"text": "one"}\n\n{"text": \n[1]\n{"text": "two"}\n',
        ["line 3: not valid", "line 4: expected a JSON"],
    ),
    "e.jsonl": (
        b'{"text": "one"}\n{"text": "x", "text": "y"}\n{"text": "caf\xe9"}\n',
        ["line 2: not", "line 3: bytes"],
    ),
    "g.jsonl": (b'{"text": "one"}\n{"text": "\\ud83d"}\n{"text": "\\ud83d\\ude00"}\n', ["line 2: half of a"]),
    "f.json": (b'[{"text": "one"}, 3, {"text": "two"}]', ["item 2: expected an object, found int"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_refused_by_line_or_skipped_and_counted(tmp_path: Path, name: str) -> None:
    content, expected = BAD[name]
    path = write(tmp_path / name, content)
    with pytest.raises(UserError) as refused:
        read_rows(path)
    rows = read_rows(path, skip_bad_rows=True)
    note = next(note for note in rows.notes if "skipped" in note)
    for sentence in expected:
        assert sentence in str(refused.value) and sentence in note
    assert name in str(refused.value) and "--skip-bad-rows" in str(refused.value)
    assert f"skipped {len(expected)} bad row" in note


def test_many_bad_rows_are_counted(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="40 bad rows .* and 35 more"):
        read_rows(write(tmp_path / "a.csv", "a,b\n1,2\n" + "1\n" * 40))


REFUSED = {
    "empty.csv": (b"", "is empty"),
    "header.csv": (b"text,label\n", "has no rows"),
    "twice.csv": (b"a,a\n1,2\n", '"a" occurs more than once'),
    "noheader.csv": (b"good film,1\nbad film,0\n", "add a header line"),
    "blank.jsonl": (b"\n\n", "has no rows"),
    "dict.json": (b'{"a": 1}', "expected a JSON list of objects, found dict"),
    "lines.json": (b'{"a": 1}\n{"a": 2}\n', 'call it ".jsonl"'),
    "a.parquet": (b"not parquet at all", "not a readable Parquet file"),
    "a.xlsx": (b"PK", r'the extension ".xlsx", expected one of .csv, .tsv'),
    "noextension": (b"a,b\n", 'the extension ""'),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_files(tmp_path: Path, name: str) -> None:
    content, sentence = REFUSED[name]
    with pytest.raises(UserError) as refused:
        read_rows(write(tmp_path / name, content))
    assert sentence in str(refused.value) and name in str(refused.value)


def test_an_index_column_without_a_name_is_named(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path / "a.csv", ",text\n0,one\n1,two\n"))
    assert rows.columns == ["column_1", "text"]
    assert any("without a name" in note for note in rows.notes)


def test_jsonl_keeps_unusual_line_separators(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False) + "\n")
    assert read_rows(path).rows[0]["text"] == "a\u2028b\x85c"


def test_parquet_equals_json_lines(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = [{"text": "one", "label": 1, "tags": ["a"]}, {"text": "two", "label": None, "tags": []}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "a.parquet")
    write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, table)))
    assert read_rows(tmp_path / "a.parquet").sha256 == read_rows(tmp_path / "a.jsonl").sha256
