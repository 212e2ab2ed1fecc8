"""y' = C LN(mean s): a pyramid beside a frozen vision transformer that reads every block once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunewise.core.delta import Delta, P, SiteDelta
from tunewise.core.errors import UserError
from tunewise.core.forward import first_tensor
from tunewise.sites import Site

from .attention import attending_module
from .classifier import last_classifier, pixel_site
from .side import Side

__all__ = ["HierarchicalSide", "MetaHierarchicalSide", "MetaTokens"]

RATIO, STD = 4, 0.02


class HierarchicalSide(Side):
    """y' = C LN(mean x) + c, where x goes through stages of half the resolution each and reads one tap per block:

    x <- x + Attention(LN x; LN_i B_k g_i, mean B_k h_i), x <- x + resize(B_k h_i), x <- x + MLP(LN x).

    y' `[rows, classes]` stands in the place of the classifier's logits. h_i are patch states of block i, resized
    bilinearly to the stage, g_i its class token; B_k `[widths[k], width]` is shared by the taps of stage k, LN_i by
    none. Stage 1 begins at the image: conv 3 / 2, norm, ReLU, conv 2 / 2, LN; the others conv 3 / 2, LN. Taps go to
    the stages in equal shares; a backbone with fewer blocks than widths has as many stages as blocks. Nothing is sent
    back through the backbone. Heads must divide widths. Linear layers and C start truncated normal (std 0.02), step 0
    is not the base. About 0.78 M scalars on ViT-B.
    Our reading: this is the paper's side network alone, so the class token stands for its meta tokens, which are
    learnt through the backbone (MetaHierarchicalSide). Its batch norms are a group norm over all channels and a
    layer norm here, as rows that share a batch must not change each other. No drop-path.
    Source: HST, arXiv 2310.05393. Raises `UserError` for models that see no pixels or have no classifier.
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    identity: ClassVar[bool] = False
    widths: tuple[int, ...] = (32, 48, 64, 72)
    heads: tuple[int, ...] = (2, 4, 8, 12)

    @property
    def in_place(self) -> bool:
        return "frozen_backbone" in self.gives

    def chosen(self, everything: Sequence[Site]) -> list[Site]:
        pixel_site(everything, "HierarchicalSide")
        return last_classifier(everything, "HierarchicalSide")

    def listens(self, everything: Sequence[Site], taps: Sequence[Site]) -> dict[str, nn.Module]:
        return {"pixels": pixel_site(everything, "HierarchicalSide").module}

    def stages(self, count: int) -> list[range]:
        """Which taps each stage reads."""
        n = min(len(self.widths), count)
        return [range(count * k // n, count * (k + 1) // n) for k in range(n)]

    def start(self, site: Site, taps: Sequence[Site]) -> dict[str, P]:
        if len(self.heads) != len(self.widths) or any(
            w % h for w, h in zip(self.widths, self.heads, strict=True)
        ):
            raise UserError(f"heads={list(self.heads)} must divide widths={list(self.widths)}, one by one.")
        config = attending_module(taps[0].module, taps[0].name).config
        before, found = int(getattr(config, "num_channels", None) or 3), dict[str, P]()
        for k, group in enumerate(self.stages(len(taps))):
            c = self.widths[k]
            if k == 0:
                found["stem"] = P(_conv(c, before, 3), "weight")
                found |= _norm("stem_norm", c) | {"stem2": P(_conv(c, c, 2), "weight")}
                found["stem2_bias"] = P(torch.zeros(c), "bias")
            else:
                found[f"down{k}"] = P(_conv(c, before, 3), "weight")
                found[f"down{k}_bias"] = P(torch.zeros(c), "bias")
            found |= _norm(f"in{k}", c) | _norm(f"out{k}", c)
            found |= _linear(f"bridge{k}", c, taps[0].out_features or 1)
            for i in group:
                found |= _norm(f"token{i}", c) | _norm(f"ask{i}", c) | _norm(f"think{i}", c)
                for name in ("query", "key", "value", "proj"):
                    found |= _linear(f"{name}{i}", c, c)
                found |= _linear(f"up{i}", RATIO * c, c) | _linear(f"low{i}", c, RATIO * c)
            before = c
        return found | _linear("answer", site.out_features or 1, before, "head")

    def read(self, t: Any, taps: list[Tensor], y: Tensor) -> Tensor:
        calls, t.buffer.calls = t.buffer.calls, {}
        if "pixels" not in calls:
            raise UserError("HierarchicalSide listens to the layer that sees pixels, which was not called.")
        pixels = calls["pixels"][0].detach().to(y.dtype)
        conv = t.listens["pixels"]
        height, width = (n // s for n, s in zip(pixels.shape[-2:], conv.stride, strict=True))
        h = [tap.to(y.dtype) for tap in taps]
        maps = [x[:, -height * width :].mT.unflatten(2, (height, width)) for x in h]
        return self._pyramid(t, pixels, maps, self.tokens(t, h))

    def tokens(self, t: Any, h: list[Tensor]) -> list[Tensor]:
        """g_i `[rows, 1, width]`: what stands for the whole image at every block."""
        return [x[:, :1] for x in h]

    def _pyramid(self, t: Any, pixels: Tensor, maps: list[Tensor], tokens: list[Tensor]) -> Tensor:
        x = pixels
        for k, group in enumerate(self.stages(len(maps))):
            if k == 0:
                x = F.conv2d(x, t.stem, stride=2, padding=1)
                x = F.relu(F.group_norm(x, 1, t.stem_norm, t.stem_norm_bias))
                x = F.conv2d(x, t.stem2, t.stem2_bias, stride=2)
            else:
                x = F.conv2d(x, getattr(t, f"down{k}"), getattr(t, f"down{k}_bias"), stride=2, padding=1)
            size = x.shape[-2:]
            x = _normed(t, f"in{k}", x.flatten(2).mT)
            for i in group:
                x = self._block(t, k, i, x, maps[i], tokens[i], size)
            x = _normed(t, f"out{k}", x)
            if k < len(self.stages(len(maps))) - 1:
                x = x.mT.unflatten(2, size)
        return _through(t, "answer", F.layer_norm(x.mean(1), x.shape[-1:]))

    def _block(self, t: Any, k: int, i: int, x: Tensor, states: Tensor, token: Tensor, size: Any) -> Tensor:
        # a linear map and a resize with weights that sum to 1 commute: the smaller of both comes first
        low = _through(t, f"bridge{k}", states.flatten(2).mT).mT.unflatten(2, states.shape[-2:])
        tap = F.interpolate(low, size=tuple(size), mode="bilinear", align_corners=False).flatten(2).mT
        token = _normed(t, f"token{i}", _through(t, f"bridge{k}", token))
        pair = torch.cat([token, tap.mean(1, keepdim=True)], 1)
        q, key, value = (
            _through(t, f"{name}{i}", z).unflatten(2, (self.heads[k], -1)).transpose(1, 2)
            for name, z in (("query", _normed(t, f"ask{i}", x)), ("key", pair), ("value", pair))
        )
        answer = F.scaled_dot_product_attention(q, key, value).transpose(1, 2).flatten(2)
        x = x + _through(t, f"proj{i}", answer) + tap
        inner = F.gelu(_through(t, f"up{i}", _normed(t, f"think{i}", x)))
        return x + _through(t, f"low{i}", inner)

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        config = attending_module(taps[0].module, taps[0].name).config
        before, total = int(getattr(config, "num_channels", None) or 3), 0
        for k, group in enumerate(self.stages(len(taps))):
            c = self.widths[k]
            down = 9 * c * before + (2 * c + 4 * c * c + c if k == 0 else c)
            blocks = 6 * c + 4 * c * (c + 1) + RATIO * c * (c + 1) + c * (RATIO * c + 1)
            total += down + 4 * c + c * ((taps[0].out_features or 0) + 1) + len(group) * blocks
            before = c
        return total + (site.out_features or 0) * (before + 1)


class MetaHierarchicalSide(HierarchicalSide):
    """HierarchicalSide whose g_i is what block i makes of a learnt meta token, as published; needs MetaTokens.

    Their gradient goes through the whole backbone, so memory grows with its depth and no state can be kept.
    """

    gives: ClassVar[frozenset[str]] = frozenset()

    def tokens(self, t: Any, h: list[Tensor]) -> list[Tensor]:
        found = []
        for block in t.taps:
            mine = [m for m in block.children() if isinstance(m, SiteDelta) and "left" in m.__dict__]
            if len(mine) != 1:
                raise UserError("MetaHierarchicalSide needs MetaTokens at every block: use hst(meta=True).")
            found.append(mine[0].__dict__.pop("left").to(h[0].dtype))
        return found


class MetaTokens(Delta):
    """[m_i; X_i] = block_i([M_i; X_{i-1}]), M_i `[1, width]`: a token in front of each block, taken out behind it.

    M_i starts at U(-v, v), v = sqrt(3 / width). m_i is kept for the side network that reads it. Images only
    (`UserError` where a mask is given). Trainable scalars: width per block. Source: HST, arXiv 2310.05393.
    """

    kinds: ClassVar[tuple[str, ...]] = ("block",)
    identity: ClassVar[bool] = False
    sites: str | list[str] = "block"

    def tensors(self, site: Site) -> dict[str, P]:
        if site.in_features is None:
            raise UserError(f"The width of {site.name} is not known, so it takes no meta token.")
        bound = (3 / site.in_features) ** 0.5
        return {"M": P(torch.empty(1, site.in_features).uniform_(-bound, bound), "prompt")}

    def around(self, t: Any, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, put = first_tensor(args, kwargs)
        if any(isinstance(v, Tensor) for v in (*args[1:], kwargs.get("attention_mask"))):
            raise UserError("MetaTokens stand in front of patches, and this model masks its tokens.")
        args, kwargs = put(torch.cat([t.M.to(x.dtype).expand(len(x), -1, -1), x], 1))
        result = call(*args, **kwargs)
        y = result[0] if isinstance(result, tuple) else result
        t.__dict__["left"] = y[:, :1]
        return (y[:, 1:], *result[1:]) if isinstance(result, tuple) else y[:, 1:]

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        return int(site.in_features or 0)


def _conv(outs: int, ins: int, size: int) -> Tensor:
    return torch.randn(outs, ins, size, size) * (2 / (size * size * outs)) ** 0.5


def _linear(name: str, outs: int, ins: int, tag: str = "weight") -> dict[str, P]:
    weight = nn.init.trunc_normal_(torch.empty(outs, ins), std=STD)
    return {name: P(weight, tag), f"{name}_bias": P(torch.zeros(outs), "head" if tag == "head" else "bias")}


def _norm(name: str, size: int) -> dict[str, P]:
    return {name: P(torch.ones(size), "scale"), f"{name}_bias": P(torch.zeros(size), "bias")}


def _through(t: Any, name: str, x: Tensor) -> Tensor:
    return F.linear(x, getattr(t, name), getattr(t, f"{name}_bias"))


def _normed(t: Any, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], getattr(t, name), getattr(t, f"{name}_bias"))
