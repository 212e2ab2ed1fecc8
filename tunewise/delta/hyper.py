"""W_down, W_up = G I, I = LN(MLP([z_task; z_layer; z_position])): adapters whose weights one network writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from tunewise.core.delta import Delta, P
from tunewise.core.errors import UserError
from tunewise.sites import Site

from .adapter import Bottleneck, Function, SeriesAdapter, Weights, ends

__all__ = ["Generated", "HyperAdapter"]


class Generated(Bottleneck):
    """y' = y + Ad_task(y), the weights of Ad computed from the embedding z `[embedding]` of a task.

    `tasks` counts the embeddings, `task` is the one in use; it may be set on the part between two batches. The
    generator is shared by all tasks, so that what one learns serves the others. `fold` writes the weights of the
    current task down as plain series adapters.
    """

    kinds: ClassVar[tuple[str, ...]] = ("attention", "mlp")
    function: Function = "gelu"
    gives: ClassVar[frozenset[str]] = frozenset({"folds"})
    sites: str | list[str] = "attention | mlp"
    tasks: PositiveInt = 1
    task: NonNegativeInt = 0
    embedding: PositiveInt = 64

    def embeddings(self) -> dict[str, P]:
        """z of every task, N(0, 1). Raises `UserError` for a task that there is not."""
        if self.task >= self.tasks:
            raise UserError(
                f"{type(self).__name__}: task={self.task} is not one of the tasks 0 to {self.tasks - 1}."
            )
        return {"tasks": P(torch.randn(self.tasks, self.embedding), "weight", 0)}

    def output(self, t: Any, x: Tensor, y: Tensor) -> Tensor:
        return y + self.adapt(t, y)

    def folded(
        self, entries: Sequence[tuple[Site, Any]], model: nn.Module
    ) -> tuple[Delta, dict[str, dict[str, Tensor]]]:
        """The adapters of the current task as constants: SeriesAdapter and its tensors at every site."""
        found = {site.name: self.weights(t) for site, t in entries}
        factors = {site.name: t.factor if self.scale == "learned" else self.scale for site, t in entries}
        one = next(iter(found.values()))
        plain = SeriesAdapter(
            size=max(len(w.down) for w in found.values()),
            function=self.function,
            dropout=self.dropout,
            sites=self.sites,
            bias=one.down_bias is not None,
            norm="none" if one.after is None else "after",
        )
        return plain, {name: _plain(w, factors[name]) for name, w in found.items()}


class HyperAdapter(Generated):
    """W = G I + g for each of W_down, b_down, W_up, b_up and the gain and shift of a LayerNorm behind W_up, with
    I = LN(V2 relu(V1 [z_task; z_layer; z_position] + v1) + v2), `[projected]`.

    One G and g per kind of weight serve all layers; the position is attention or MLP. Embeddings start as N(0, 1),
    V1, V2 and G as N(0, 0.01), v and g at 0, and G and g of the gain and shift at 0, so step 0 is the base model (the
    authors start near it). All sites must have one width (`UserError`). Trainable scalars do not grow with the depth
    but for `embedding` per layer. Source: HyperFormer++, arXiv 2106.04489, without training the backbone's own norms.
    """

    size: PositiveInt = 8
    hidden: PositiveInt = 128
    projected: PositiveInt = 64
    # site -> (number of its layer, 0 for attention or 1 for MLP); no annotation, so no option
    _places = {}  # type: dict[str, tuple[int, int]]

    def _sizes(self, width: int) -> dict[str, tuple[int, ...]]:
        vectors = {"down_bias": (self.size,), "up_bias": (width,), "gain": (width,), "shift": (width,)}
        return {"down": (self.size, width), "up": (width, self.size), **vectors}

    def shared(self, sites: Sequence[Site]) -> dict[str, P]:
        width = _one_width(self, sites)
        layers = {(s.stack, s.layer): 0 for s in sites}
        numbers = {key: i for i, key in enumerate(layers)}
        kinds = {kind: i for i, kind in enumerate(sorted({s.kind for s in sites}))}
        self._places = {s.name: (numbers[s.stack, s.layer], kinds[s.kind]) for s in sites}
        found = self.embeddings()
        found |= {"layers": P(torch.randn(len(numbers), self.embedding), "weight")}
        found |= {"positions": P(torch.randn(len(kinds), self.embedding), "weight")}
        for name, rows, columns in (
            ("V1", self.hidden, 3 * self.embedding),
            ("V2", self.projected, self.hidden),
        ):
            found[name] = P(torch.randn(rows, columns) * 0.01, "weight")
            found[name.lower()] = P(torch.zeros(rows), "bias")
        found["LN_gain"] = P(torch.ones(self.projected), "scale")
        found["LN_shift"] = P(torch.zeros(self.projected), "bias")
        for name, shape in self._sizes(width).items():
            count = int(torch.Size(shape).numel())
            spread = 0.0 if name in ("gain", "shift") else 0.01
            found[f"G_{name}"] = P(torch.randn(count, self.projected) * spread, "weight")
            found[f"g_{name}"] = P(torch.zeros(count), "bias")
        return found

    def tensors(self, site: Site) -> dict[str, P]:
        place = torch.tensor(self._places[site.name])
        return {"place": P(place, trainable=False, saved=False)} | self.factor()

    def weights(self, t: Any) -> Weights:
        g = t.shared
        layer, position = (
            table.index_select(0, t.place[i : i + 1])[0] for i, table in enumerate((g.layers, g.positions))
        )
        hidden = F.relu(F.linear(torch.cat([g.tasks[self.task], layer, position]), g.V1, g.v1))
        code = F.layer_norm(F.linear(hidden, g.V2, g.v2), (self.projected,), g.LN_gain, g.LN_shift)
        w = {
            name: F.linear(code, getattr(g, f"G_{name}"), getattr(g, f"g_{name}")).view(shape)
            for name, shape in self._sizes(len(g.g_up_bias)).items()
        }
        gain, shift = w.pop("gain"), w.pop("shift")
        return Weights(w["down"], w["up"], w["down_bias"], w["up_bias"], after=(gain, shift))

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        return int(self.scale == "learned")


def _one_width(part: Bottleneck, sites: Sequence[Site]) -> int:
    """The width that all these sites have. Raises `UserError` where they differ."""
    widths = {ends(s, part.reads)[0]: s.name for s in reversed(sites)}
    if len(widths) > 1:
        shown = " and ".join(f"{name} has {width}" for width, name in list(widths.items())[:2])
        raise UserError(
            f"{type(part).__name__} writes weights of one width, but {shown}: choose sites of one width, or polyhistor."
        )
    return next(iter(widths))


def _plain(w: Weights, factor: Any) -> dict[str, Tensor]:
    """The tensors of a SeriesAdapter of scale 1 that computes factor * Ad."""
    up_bias, last = w.up_bias, None
    if w.after is None:
        up, up_bias = w.up * factor, None if up_bias is None else up_bias * factor
    else:
        up, last = w.up, tuple(value * factor for value in w.after)
    found = {"down": w.down, "up": up, "down_bias": w.down_bias, "up_bias": up_bias}
    found |= {} if last is None else {"gain": last[0], "shift": last[1]}
    return {name: value for name, value in found.items() if value is not None}
