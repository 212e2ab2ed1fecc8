"""Image classification: pixels as the checkpoint's processor makes them, sizes, batches, a run from end to end."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import tunewise as tw
from tests.models import tiny
from tunewise.core.errors import UserError
from tunewise.data import detect_columns, read_rows
from tunewise.data.image import Picture
from tunewise.task import ImageClassification, Task, make_task
from tunewise.task.image import PIXELS
from tunewise.task.pixels import DEVIATION, MEAN, Eye, eye_of, pixels_of

Image = pytest.importorskip("PIL.Image")
CALLS = {"task": "image_classification"}


def picture(seed: int, height: int = 16, width: int = 16, bright: int = 0) -> bytes:
    values = np.random.default_rng(seed).integers(0, 120, (height, width, 3), dtype=np.uint8)
    values[:, :, bright] += 100
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG")
    return stream.getvalue()


def rows(count: int = 12, **size: int) -> list[dict[str, Any]]:
    return [
        {"image": picture(i, bright=2 * (i % 2), **size), "label": ("red", "blue")[i % 2]}
        for i in range(count)
    ]


def fitted(data: Any = None, **options: Any) -> tuple[ImageClassification, list[dict[str, Any]]]:
    read = read_rows(data or rows())
    task = make_task(None, detect_columns(read), **options)
    assert isinstance(task, ImageClassification)
    task.fit(read.rows)
    return task, read.rows


def test_own_pixels_are_resized_cut_and_normalised() -> None:
    wide = Picture(picture(1, 16, 32), "it")
    found = pixels_of(wide, 16, 3)
    values = np.asarray(wide.open(), np.float32)[:, 8:24] / 255
    wanted = (values - np.array(MEAN, np.float32)) / np.array(DEVIATION, np.float32)
    assert torch.allclose(found, torch.from_numpy(wanted).permute(2, 0, 1), atol=1e-6)
    assert pixels_of(wide, 8, 3).shape == (3, 8, 8) and pixels_of(wide, 24, 1).shape == (1, 24, 24)


def processor(**options: Any) -> Any:
    from transformers import ViTImageProcessorPil

    return ViTImageProcessorPil(size={"height": 16, "width": 16}, **options)


def test_the_checkpoints_processor_is_used_where_it_works() -> None:
    made = processor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    given = Picture(picture(1, 20, 20), "it")
    wanted = made(images=[given.open()], return_tensors="pt")["pixel_values"][0]
    assert torch.allclose(pixels_of(given, 16, 3, made), wanted)
    assert not torch.allclose(pixels_of(given, 16, 3), wanted)
    assert pixels_of(given, 24, 3, made).shape == (3, 24, 24)


def test_own_pixels_agree_with_the_processor() -> None:
    made = processor(image_mean=list(MEAN), image_std=list(DEVIATION), resample=3)
    given = Picture(picture(1, 20, 20), "it")
    assert torch.allclose(pixels_of(given, 16, 3, made), pixels_of(given, 16, 3), atol=0.02)


def test_sizes_follow_model_and_data() -> None:
    assert eye_of(tiny("vit").config) == Eye(16, None, 3)
    assert eye_of(tiny("dinov2").config) == Eye(16, 8, 3)
    dinov2 = Eye(518, 14)
    assert dinov2.chosen(None, 56, 224) == 56 and dinov2.chosen(None, 50, 224) == 56
    assert dinov2.chosen(None, 1000, 224) == 224 and dinov2.chosen(None, 3, 224) == 28
    assert dinov2.chosen(112, 56, 224) == 112
    assert Eye(224, None).chosen(None, 56) == 224
    with pytest.raises(UserError, match="multiple of 14, for example 56"):
        dinov2.chosen(60, None)
    with pytest.raises(UserError, match="which takes 224 pixels"):
        Eye(224, None).chosen(112, None)


def test_examples_and_batches() -> None:
    task, data = fitted()
    task.bind(tiny("dinov2").config)
    examples = task.encode(data, None)
    batch = task.collate(examples[:3], None)
    assert batch.inputs["pixel_values"].shape == (3, 3, 16, 16) and batch.ids == [r["id"] for r in data[:3]]
    assert batch.labels is not None and batch.labels.tolist() == [task.label_of(r) for r in data[:3]]
    assert any("16 x 16" in note for note in task.notes)
    logits = torch.eye(2)[batch.labels] * 5
    assert task.predict(logits, batch) == [r["label"] for r in data[:3]]
    predictions = [r["label"] for r in data]
    assert (
        task.metrics(predictions, data)["accuracy"] == task.metrics(predictions, examples)["accuracy"] == 1.0
    )


def test_beyond_the_memory_images_are_decoded_for_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    from tunewise.task import image

    task, data = fitted()
    task.bind(tiny("dinov2").config)
    wanted = task.collate(task.encode(data, None), None).inputs["pixel_values"]
    monkeypatch.setattr(image, "KEPT_BYTES", 4 * 3 * 16 * 16 * 4)
    lean = task.encode(data, None)
    assert sum(isinstance(e[PIXELS], Picture) for e in lean) == len(data) - 4
    assert torch.equal(task.collate(lean, None).inputs["pixel_values"], wanted)


def test_description_comes_back() -> None:
    task, data = fitted(image_size=24)
    task.bind(tiny("dinov2").config)
    again = Task.from_description(json.loads(json.dumps(task.describe())))
    assert again.describe() == task.describe()
    assert torch.equal(
        again.collate(again.encode(data, None), None).inputs["pixel_values"],
        task.collate(task.encode(data, None), None).inputs["pixel_values"],
    )


def test_what_is_refused() -> None:
    task, data = fitted()
    with pytest.raises(UserError, match="max_length counts tokens"):
        fitted(max_length=8)
    with pytest.raises(UserError, match="has no image in the column"):
        task.encode([{"id": "7", "label": "red"}], None)
    with pytest.raises(UserError, match=r'Row 7: "image" holds "gone.png"'):
        task.encode([{"id": "7", "image": "gone.png", "label": "red"}], None)
    broken = Picture(picture(1)[:70], "labels.parquet, row 3")
    with pytest.raises(UserError, match=r"The image labels.parquet, row 3 cannot be read"):
        task.encode([{"id": "7", "image": broken, "label": "red"}], None)
    with pytest.raises(UserError, match='called "image_classification"'):
        make_task("vision", task.columns)
    with pytest.raises(UserError, match="looks at images, and this model reads text"):
        task.encode(data, SimpleNamespace(model_max_length=512))
    texts = read_rows([{"text": f"some words {i}", "label": i % 2} for i in range(6)])
    with pytest.raises(UserError, match="reads text, and this model looks at images"):
        make_task(None, detect_columns(texts)).encode(texts.rows, processor())


def saved(path: Path, name: str, bare: bool = False) -> Path:
    model: Any = tiny(name)
    (model.base_model if bare else model).save_pretrained(path)
    return path


@pytest.mark.parametrize("method", ["lora(rank=2)", "linear_probe", "vqt(queries=2)", "hst"])
def test_a_run_from_a_folder_of_images_to_its_report(tmp_path: Path, method: str) -> None:
    for i, row in enumerate(rows(40)):
        place = tmp_path / "data" / row["label"]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}.png").write_bytes(row["image"])
    model = saved(tmp_path / "model", "dinov2", bare=True)
    said: list[str] = []
    result = tw.tune(
        str(model),
        str(tmp_path / "data"),
        method=method,
        lr=1e-2,
        steps=None if method == "linear_probe" else 12,
        batch_size=8,
        out=tmp_path / "run",
        device="cpu",
        say=said.append,
    )
    assert any("16 x 16 pixels" in sentence for sentence in said)
    assert result.metrics["valid/accuracy"] > 0.6
    report = (tmp_path / "run" / "report.html").read_text()
    assert "image_classification" in report
    predicted = tw.predict(tmp_path / "run", str(tmp_path / "data"), device="cpu")
    assert len(predicted) == 40 and set(predicted[0]) == {"id", "image", "prediction"}
    assert predicted[0]["image"].endswith(".png")
    again = result.predict(str(tmp_path / "data"))
    assert [p["prediction"] for p in predicted] == [p["prediction"] for p in again]


def test_a_bare_encoder_as_an_object_needs_no_processor(tmp_path: Path) -> None:
    model: Any = tiny("dinov2").base_model
    result = tw.tune(model, rows(40), method="bitfit", lr=1e-2, steps=8, batch_size=8, device="cpu")
    assert result.metrics["trainable"] > 0 and "valid/loss" in result.metrics
