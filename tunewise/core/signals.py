"""Signals: activations, output gradients, and weight gradients of frozen weights; tapped only while someone
listens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tunewise.sites import Site

__all__ = ["Signals"]


class Signals:
    """Hooks on sites that exist for the time of a `with` block."""

    def __init__(self) -> None:
        self.listening = 0

    @contextmanager
    def activations(self, sites: list[Site], hear: Callable[[Site, Tensor, Tensor], None]) -> Iterator[None]:
        """`hear(site, x, y)`: detached input and output at every call of every site."""

        def hook(site: Site) -> Callable[..., None]:
            def call(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
                x = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
                hear(site, x.detach(), (y[0] if isinstance(y, tuple) else y).detach())

            return call

        hooks = [s.module.register_forward_hook(hook(s), with_kwargs=True) for s in sites]
        with self._count(hooks):
            yield

    @contextmanager
    def output_gradients(
        self, sites: list[Site], hear: Callable[[Site, Tensor, Tensor], None]
    ) -> Iterator[None]:
        """`hear(site, x, dL/dy)` in the backward pass; x is kept for that time."""

        def hook(site: Site) -> Callable[..., None]:
            def call(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
                x = (args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))).detach()
                out = y[0] if isinstance(y, tuple) else y
                if out.requires_grad:
                    out.register_hook(lambda g: hear(site, x, g.detach()))

            return call

        hooks = [s.module.register_forward_hook(hook(s), with_kwargs=True) for s in sites]
        with self._count(hooks):
            yield

    @contextmanager
    def weight_grad(self, sites: list[Site], hear: Callable[[Site, Tensor], None]) -> Iterator[None]:
        """`hear(site, dL/dW)` `[out, in]` of linear sites, one tensor at a time, also where W is frozen."""

        def outer(site: Site, x: Tensor, g: Tensor) -> None:
            hear(site, g.reshape(-1, g.shape[-1]).T @ x.reshape(-1, x.shape[-1]).to(g.dtype))

        with self.output_gradients(sites, outer):
            yield

    @contextmanager
    def _count(self, hooks: list[torch.utils.hooks.RemovableHandle]) -> Iterator[None]:
        self.listening += len(hooks)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self.listening -= len(hooks)
