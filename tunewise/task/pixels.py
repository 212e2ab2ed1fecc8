"""Images -> `[channels, height, width]` float32, as the checkpoint's own processor makes them, or by its numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunewise.core.errors import UserError
from tunewise.data.image import Picture, pillow

__all__ = ["Eye", "eye_of", "pixels_of"]

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet: what a model without a processor was most likely trained with."""
EDGE = 224
BICUBIC = 3
# How many pixels along an edge these take besides what they were trained with: any multiple of this number.
ANY_SIZE: dict[str, int | None] = {"dinov2": None, "dinov2_with_registers": None, "dinov3_vit": None}
ANY_SIZE |= dict.fromkeys(("convnext", "convnextv2", "resnet", "regnet", "mobilenet_v2", "efficientnet"), 32)


@dataclass(frozen=True)
class Eye:
    """What a model can look at.

    edge      pixels along an edge that it was trained with; None: its configuration does not say
    multiple  any multiple of this many pixels is taken too; None: only `edge`
    channels  1 or 3
    """

    edge: int | None
    multiple: int | None
    channels: int = 3

    def chosen(self, wanted: int | None, largest: int | None, usual: int | None = None) -> int:
        """Pixels along an edge: what is wanted, else the `usual` ones, but not more than the images have.

        Raises `UserError` for a size that the model does not take.
        """
        if wanted is not None:
            self._check(wanted)
            return wanted
        if self.multiple is None:
            return self.edge or usual or EDGE
        edge = usual or self.edge or EDGE
        if largest is None:
            return edge
        return min(edge, max(2, -(-largest // self.multiple)) * self.multiple)

    def _check(self, wanted: int) -> None:
        if self.multiple is None and self.edge not in (None, wanted):
            raise UserError(f"image_size={wanted} does not suit this model, which takes {self.edge} pixels.")
        if self.multiple is not None and (wanted % self.multiple or wanted < self.multiple):
            below = max(wanted // self.multiple, 1) * self.multiple
            raise UserError(
                f"image_size={wanted} does not suit this model: expected a multiple of {self.multiple}, "
                f"for example {below}."
            )


def eye_of(config: Any) -> Eye:
    """Read from a model's configuration; of a model of images and texts, its vision half."""
    config = getattr(config, "vision_config", None) or config
    kind = getattr(config, "model_type", "")
    size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    size, patch = (int(n[0]) if isinstance(n, (list, tuple)) else n for n in (size, patch))
    multiple = ANY_SIZE.get(kind) or (patch if kind in ANY_SIZE else None)
    return Eye(None if size is None else int(size), multiple, int(getattr(config, "num_channels", None) or 3))


def usual_edge(processor: Any) -> int | None:
    """Pixels along an edge of what a processor gives; None where it does not say."""
    asked = ["crop_size"] if getattr(processor, "do_center_crop", False) else []
    for name in [*asked, "size"]:
        value = getattr(processor, name, None)
        for key in ("height", "shortest_edge"):
            found = _in_size(value, key)
            if found is not None:
                return found
    return None


def _in_size(value: Any, key: str) -> int | None:
    """An entry of a size, which is a mapping or an object with attributes."""
    found = value.get(key) if isinstance(value, dict) else getattr(value, key, None)
    return found if isinstance(found, int) else None


def pixels_of(picture: Picture, edge: int, channels: int, processor: Any = None) -> Tensor:
    """One image as the model takes it, `[channels, edge, edge]`; raises `UserError` that names a broken one."""
    image = picture.open()
    if processor is not None and channels == 3:
        found = _processed(image, edge, processor)
        if tuple(found.shape) == (channels, edge, edge):
            return found
    mean = _numbers(processor, "image_mean", MEAN, channels)
    deviation = _numbers(processor, "image_std", DEVIATION, channels)
    resample = getattr(processor, "resample", None)
    return _own(image, edge, channels, mean, deviation, BICUBIC if resample is None else int(resample))


def _processed(image: Any, edge: int, processor: Any) -> Tensor:
    options: dict[str, Any] = {}
    if edge != usual_edge(processor):  # of images that are small the whole is seen
        short = _in_size(getattr(processor, "size", None), "shortest_edge") is not None
        square = {"height": edge, "width": edge}
        options = {"size": {"shortest_edge": edge} if short else square}
        if getattr(processor, "do_center_crop", False):
            options["crop_size"] = square
    values = processor(images=[image], return_tensors="np", **options)["pixel_values"]
    return torch.from_numpy(np.ascontiguousarray(values[0], dtype=np.float32))


def _own(image: Any, edge: int, channels: int, mean: Any, deviation: Any, resample: int) -> Tensor:
    """(resize(x) / 255 - mean) / deviation; the shorter edge is fitted, the longer one cut on both sides."""
    width, height = image.size
    scale = edge / min(width, height)
    size = max(edge, round(width * scale)), max(edge, round(height * scale))
    if size != (width, height):
        image = image.resize(size, pillow().Resampling(resample))
    left, top = (size[0] - edge) // 2, (size[1] - edge) // 2
    image = image.crop((left, top, left + edge, top + edge))
    values = np.asarray(image if channels == 3 else image.convert("L"), dtype=np.float32) / 255
    values = values.reshape(edge, edge, channels)
    values = (values - np.asarray(mean, np.float32)) / np.asarray(deviation, np.float32)
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))


def _numbers(processor: Any, name: str, default: tuple[float, ...], channels: int) -> tuple[float, ...]:
    found = getattr(processor, name, None)
    found = tuple(found) if isinstance(found, (list, tuple)) else default
    return found if len(found) == channels else (float(np.mean(found)),) * channels
