"""l_i = -log softmax(logits_i)[label_i]: one class per image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from tunewise.core.errors import UserError, did_you_mean
from tunewise.data import Columns
from tunewise.data.image import Picture
from tunewise.task.base import Batch, CustomMetric, Example, Row
from tunewise.task.classification import Classification
from tunewise.task.pixels import Eye, eye_of, pixels_of, usual_edge

if TYPE_CHECKING:
    from tunewise.head import Head

__all__ = ["ImageClassification"]

PIXELS = "tw_pixels"
"""Where an example keeps its pixels, or the picture if memory is to be spared; no column of data has this name."""
KEPT_BYTES = 2**30
SEEN = 500
"""Training images whose size is read."""


class ImageClassification(Classification):
    """Cross-entropy over the classes of the training images; predictions are class names.

    image_size  pixels along an edge; None means what the checkpoint's processor gives, but where the model takes
                any size not more than the largest training image has
    Images are decoded once and kept as pixels up to 1 GiB, beyond that decoded for every batch. Each is decoded
    before anything is trained: a broken one is refused with its file, or its source and row.
    """

    name: ClassVar[str] = "image_classification"
    needs_tokenizer: ClassVar[bool] = False

    def __init__(
        self,
        columns: Columns,
        *,
        image_size: int | None = None,
        max_length: int | None = None,
        metric: str | CustomMetric | None = None,
        higher_is_better: bool = True,
    ) -> None:
        super().__init__(columns, metric=metric, higher_is_better=higher_is_better)
        if max_length is not None:
            raise UserError("max_length counts tokens, and images have none: --image-size sets their pixels.")
        self.image_size = image_size
        self.largest: int | None = None
        self.eye: Eye | None = None
        self._processor: Any = None

    def fit(self, rows: Sequence[Row]) -> None:
        super().fit(rows)
        if self.image_size is None:
            few = rows[:: max(1, len(rows) // SEEN)]
            self.largest = max(max(self.picture_of(row).size) for row in few)

    def picture_of(self, row: Row) -> Picture:
        """The image of a row. Raises `UserError` for a row without one."""
        column = self.columns.text[0]
        value = row.get(column)
        if isinstance(value, Picture):
            return value
        if value is None:
            where = "." if column in row else did_you_mean(column, [k for k in row if k != "id"])
            raise UserError(f'Row {row["id"]} has no image in the column "{column}"{where}')
        shown = f'"{value}"' if isinstance(value, str) else type(value).__name__
        raise UserError(f'Row {row["id"]}: "{column}" holds {shown}, which is no image that is there.')

    def default_head(self, config: Any = None) -> Head:
        from tunewise.head import ImageHead

        return ImageHead()

    def bind(self, config: Any) -> None:
        self.eye = eye_of(config)
        self.eye.chosen(self.image_size, self.largest)

    def limit(self, tokenizer: Any) -> int:
        """No tokens are counted."""
        return 1

    def edge(self, processor: Any) -> int:
        """Pixels along an edge of what the model is given."""
        eye = self.eye or Eye(None, None)
        return eye.chosen(self.image_size, self.largest, usual_edge(processor))

    def encode(
        self, rows: Sequence[Row], tokenizer: Any, head: Head | None = None, *, labelled: bool = True
    ) -> list[Example]:
        """Examples with id, pixels and labels (None if not `labelled`); `tokenizer` is the image processor."""
        if hasattr(tokenizer, "model_max_length"):
            raise UserError(f"The task {self.name} looks at images, and this model reads text.")
        self._processor = tokenizer
        found, used = list[Example](), 0
        for row in rows:
            picture = self.picture_of(row)
            pixels = self._look(picture)
            used += pixels.nbytes
            found.append(
                {
                    "id": str(row["id"]),
                    PIXELS: pixels if used <= KEPT_BYTES else picture,
                    "labels": self.label_of(row) if labelled else None,
                    "length": 1,
                }
            )
        edge = self.edge(tokenizer)
        how = "the checkpoint's processor" if tokenizer is not None else "ImageNet's mean and deviation"
        self.notes.append(f"Images are read at {edge} x {edge} pixels, by {how} (--image-size).")
        return found

    def _look(self, picture: Picture) -> Tensor:
        channels = self.eye.channels if self.eye is not None else 3
        return pixels_of(picture, self.edge(self._processor), channels, self._processor)

    def collate(self, examples: Sequence[Example], tokenizer: Any, pad_side: str | None = None) -> Batch:
        self._processor = tokenizer if tokenizer is not None else self._processor
        pixels = [e[PIXELS] if isinstance(e[PIXELS], Tensor) else self._look(e[PIXELS]) for e in examples]
        labels, units = self.collate_labels(examples, "right")
        return Batch({"pixel_values": torch.stack(pixels)}, labels, [e["id"] for e in examples], units)

    def truth_of(self, row: Row | Example) -> int:
        return int(row["labels"]) if PIXELS in row else self.label_of(row)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "max_length": None}

    def learnt(self) -> dict[str, Any]:
        return {**super().learnt(), "image_size": self.image_size, "largest": self.largest, "_eye": self._eye}

    @property
    def _eye(self) -> list[Any] | None:
        """What `bind` has learnt, JSON-ready."""
        return None if self.eye is None else [self.eye.edge, self.eye.multiple, self.eye.channels]

    @_eye.setter
    def _eye(self, value: list[Any] | None) -> None:
        self.eye = None if value is None else Eye(*value)
