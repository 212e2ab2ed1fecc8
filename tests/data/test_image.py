"""Images in rows: bytes, files, arrays, objects; what is broken, missing or leads out of the folder."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tunewise.core.errors import UserError
from tunewise.data import detect_columns, read_rows, split_rows
from tunewise.data.image import Picture

Image = pytest.importorskip("PIL.Image")


def pixels(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape or (8, 8, 3), dtype=np.uint8)


def png(seed: int, *shape: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels(seed, *shape)).save(stream, "PNG")
    return stream.getvalue()


def folder(path: Path, count: int = 8) -> Path:
    """CLASS/N.png, two classes."""
    for i in range(count):
        place = path / ("cat", "dog")[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}.png").write_bytes(png(i))
    return path


def shown(row: dict[str, Any]) -> np.ndarray:
    return np.asarray(row["image"].open())


def test_every_form_gives_the_same_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    array = pixels(1)
    import torch

    forms = [
        png(1),
        {"bytes": png(1), "path": None},
        tmp_path / "a.png",
        Image.open(tmp_path / "a.png"),
        array,
        torch.from_numpy(array),
        array.transpose(2, 0, 1),
    ]
    for form in forms:
        rows = read_rows([{"image": form, "label": "x"}])
        assert isinstance(rows.rows[0]["image"], Picture), type(form)
        assert np.array_equal(shown(rows.rows[0]), array), type(form)


def test_ids_and_hash_follow_the_content_and_not_the_name(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png(1))
    (tmp_path / "c.png").write_bytes(png(2))
    first, same, other = (
        read_rows([{"image": tmp_path / n, "label": 1}]) for n in ("a.png", "b.png", "c.png")
    )
    assert first.rows[0]["id"] == same.rows[0]["id"] != other.rows[0]["id"]
    assert first.sha256 == same.sha256 != other.sha256


def test_equal_images_stay_in_one_set() -> None:
    rows = [{"image": png(i // 2), "label": i % 4 // 2} for i in range(80)]
    read = read_rows(rows)
    splits = split_rows(read, detect_columns(read), valid=0.3, test=0.3)
    sets = [{row["image"].digest for row in part} for _, part in splits.items()]
    assert all(sets) and not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
    assert any("Class shares" in note for note in splits.notes)


def test_columns_and_task() -> None:
    rows = read_rows(
        [{"image": png(i), "caption": f"a picture of {i} things", "kind": i % 2} for i in range(6)]
    )
    found = detect_columns(rows)
    assert (found.text, found.label, found.task) == (("image",), "kind", "image_classification")
    assert any("caption" in note for note in found.notes)
    assert detect_columns(rows, task="classification").task == "image_classification"
    many = read_rows([{"image": png(i), "label": i} for i in range(30)])
    assert detect_columns(many, label_column="label").task == "image_classification"
    with pytest.raises(UserError, match="the task regression does not take them"):
        detect_columns(rows, task="regression", text_column="image", label_column="kind")
    text = read_rows([{"text": f"some words {i}", "label": i % 2} for i in range(6)])
    with pytest.raises(UserError, match="needs a column of images"):
        detect_columns(text, task="image_classification")
    two = read_rows([{"left": png(i), "right": png(i + 9), "label": i % 2} for i in range(4)])
    with pytest.raises(UserError, match='"left" and "right" all hold images'):
        detect_columns(two)


def test_names_of_files_are_read_beside_the_table(tmp_path: Path) -> None:
    folder(tmp_path / "pics")
    table = tmp_path / "labels.csv"
    lines = [f"pics/{('cat', 'dog')[i % 2]}/{i}.png,{('cat', 'dog')[i % 2]}" for i in range(8)]
    table.write_text("\n".join(["file_name,label", *lines]), encoding="utf-8")
    rows = read_rows(table)
    assert all(isinstance(row["file_name"], Picture) for row in rows.rows)
    assert np.array_equal(np.asarray(rows.rows[3]["file_name"].open()), pixels(3))


def test_urls_and_names_of_absent_files_stay_text() -> None:
    rows = read_rows(
        [{"text": f"words {i}", "link": f"http://x/{i}.png", "file": f"gone{i}.png"} for i in range(4)]
    )
    assert rows.rows[0]["link"] == "http://x/0.png" and rows.rows[0]["file"] == "gone0.png"


@pytest.mark.parametrize("name", ["../secret.png", "{absolute}", "pics/link.png"])
def test_no_path_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.png").write_bytes(png(7))
    data = folder(tmp_path / "data" / "pics", 4).parent
    (data / "pics" / "link.png").symlink_to(tmp_path / "secret.png")
    names = ["pics/cat/0.png", "pics/dog/1.png", name.format(absolute=tmp_path / "secret.png")]
    table = data / "rows.jsonl"
    table.write_text("".join(json.dumps({"image": n, "label": "a"}) + "\n" for n in names), encoding="utf-8")
    with pytest.raises(UserError, match=r"row 3: .* leads out of the folder"):
        read_rows(table)
    rows = read_rows(table, skip_bad_rows=True)
    assert len(rows) == 2 and any("skipped 1 bad row" in note for note in rows.notes)


def test_missing_and_foreign_files_are_named_by_row(tmp_path: Path) -> None:
    folder(tmp_path / "pics", 2)
    (tmp_path / "pics" / "note.png").write_text("no image at all")
    table = tmp_path / "rows.csv"
    table.write_text("image,label\npics/cat/0.png,a\npics/gone.png,b\npics/note.png,b\n", encoding="utf-8")
    with pytest.raises(UserError) as refused:
        read_rows(table)
    text = str(refused.value)
    assert "row 2" in text and "there is no such file" in text and "row 3" in text and "known format" in text


def test_broken_pixels_name_the_file(tmp_path: Path) -> None:
    place = folder(tmp_path, 2) / "cat" / "0.png"
    place.write_bytes(place.read_bytes()[:60])
    picture = read_rows(tmp_path).rows[0]["image"]
    with pytest.raises(UserError, match=r"The image .*0\.png cannot be read: "):
        picture.open()


def test_too_many_pixels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32)
    picture = read_rows([{"image": png(1), "label": 1}]).rows[0]["image"]
    with pytest.raises(UserError, match="cannot be read: .*decompression bomb"):
        picture.open()


def test_modes_become_rgb() -> None:
    def opened(image: Any) -> np.ndarray:
        stream = io.BytesIO()
        image.save(stream, "PNG")
        return np.asarray(Picture(stream.getvalue(), "it").open())

    grey = pixels(1, 4, 4)
    assert np.array_equal(opened(Image.fromarray(grey)), np.repeat(grey[..., None], 3, 2))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert np.array_equal(opened(deep), np.repeat(grey[..., None], 3, 2))
    assert opened(Image.fromarray(pixels(2, 4, 4, 4))).shape == (4, 4, 3)
    assert opened(Image.fromarray(pixels(2)).convert("P")).shape == (8, 8, 3)


def test_plain_form_comes_back(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    for picture in (Picture(png(1), "bytes"), Picture(tmp_path / "a.png", "file")):
        again = json.loads(json.dumps(picture.plain()), object_hook=Picture.from_plain)
        assert again == picture and again.where == picture.where and again.read() == png(1)
    assert Picture.from_plain({"other": 1}) == {"other": 1}


def test_image_folders(tmp_path: Path) -> None:
    rows = read_rows(folder(tmp_path / "flat"))
    assert len(rows) == 8 and {row["label"] for row in rows.rows} == {"cat", "dog"}
    assert any("8 images in 2 folders" in note for note in rows.notes)
    sets = tmp_path / "sets"
    folder(sets / "train")
    folder(sets / "validation", 4)
    found = read_rows(sets)
    assert found.splits is not None and {n: len(p) for n, p in found.splits.items()} == {
        "train": 8,
        "valid": 4,
    }
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "x.png").write_bytes(png(1))
    (alone / "notes.md").write_text("words")
    unlabelled = read_rows(alone)
    assert list(unlabelled.rows[0]) == ["id", "image"] and any("notes.md" in n for n in unlabelled.notes)
    with pytest.raises(UserError, match="a folder has a sub-folder of images for each class"):
        detect_columns(unlabelled)
    notes = split_rows(rows, detect_columns(rows)).notes
    assert any(note.startswith("Split by hash of the image: ") for note in notes)


def test_image_folder_refuses_links_out_and_files_that_are_no_images(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(7))
    data = folder(tmp_path / "data", 4)
    (data / "cat" / "link.png").symlink_to(tmp_path / "secret.png")
    (data / "dog" / "text.png").write_text("words")
    with pytest.raises(UserError) as refused:
        read_rows(data)
    assert "cat/link.png" in str(refused.value) and "leads out" in str(refused.value)
    assert "dog/text.png" in str(refused.value)
    assert len(read_rows(data, skip_bad_rows=True)) == 4


def test_parquet_as_hugging_face_writes_it(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    made = datasets.Dataset.from_dict(
        {"image": [{"bytes": png(i), "path": None} for i in range(4)], "label": [0, 1, 0, 1]},
        features=features,
    )
    made.to_parquet(tmp_path / "train.parquet")
    rows = read_rows(tmp_path / "train.parquet")
    assert [row["label"] for row in rows.rows] == ["cat", "dog", "cat", "dog"]
    assert np.array_equal(shown(rows.rows[2]), pixels(2))
    direct = read_rows(made)
    assert [row["label"] for row in direct.rows] == ["cat", "dog", "cat", "dog"]
    assert np.array_equal(shown(direct.rows[2]), pixels(2))
    made.save_to_disk(tmp_path / "saved")
    assert np.array_equal(shown(read_rows(tmp_path / "saved").rows[1]), pixels(1))


def test_a_saved_dataset_follows_no_path_out_of_its_folder(tmp_path: Path) -> None:
    import datasets

    (tmp_path / "secret.png").write_bytes(png(7))
    kept = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features({"image": kept, "label": datasets.Value("string")})
    values = {"image": [{"bytes": None, "path": str(tmp_path / "secret.png")}] * 2, "label": ["a", "b"]}
    made = datasets.Dataset.from_dict(values, features=features)
    own = made.cast_column("image", datasets.Image())
    assert np.array_equal(shown(read_rows(own).rows[0]), pixels(7))  # the user's own object
    made.save_to_disk(tmp_path / "saved")  # an Image column would be saved with the file's bytes
    info = tmp_path / "saved" / "dataset_info.json"
    for feature in (None, {"_type": "Image"}):
        if feature is not None:
            said = json.loads(info.read_text())
            info.write_text(json.dumps({**said, "features": {**said["features"], "image": feature}}))
        with pytest.raises(UserError, match="leads out of the folder"):
            read_rows(tmp_path / "saved")


def test_rows_without_pillow_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from tunewise.data import image

    picture = Picture(png(1), "it")
    monkeypatch.setattr(image, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "tunewise\[image\]"'):
        picture.open()
