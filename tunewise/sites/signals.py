"""Signals: activations, output gradients, and weight gradients of frozen weights; tapped only while someone
listens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .site import Site

__all__ = ["Signals"]


class Signals:
    """Hooks on sites that exist for the time of a `with` block."""

    def __init__(self) -> None:
        self.listening = 0

    @contextmanager
    def activations(self, sites: list[Site], hear: Callable[[Site, Tensor, Tensor], None]) -> Iterator[None]:
        """`hear(site, x, y)`: detached input and output at every call of every site."""
        with self._hooks(sites, lambda site, x, y: hear(site, x, y.detach())):
            yield

    @contextmanager
    def output_gradients(
        self, sites: list[Site], hear: Callable[[Site, Tensor, Tensor], None]
    ) -> Iterator[None]:
        """`hear(site, x, dL/dy)` in the backward pass; x is kept for that time."""

        def called(site: Site, x: Tensor, y: Any) -> None:
            if y.requires_grad:
                y.register_hook(lambda g: hear(site, x, g.detach()))

        with self._hooks(sites, called):
            yield

    @contextmanager
    def weight_grad(self, sites: list[Site], hear: Callable[[Site, Tensor], None]) -> Iterator[None]:
        """`hear(site, dL/dW)` `[out, in]` of linear sites, one tensor at a time, also where W is frozen."""

        def outer(site: Site, x: Tensor, g: Tensor) -> None:
            hear(site, g.reshape(-1, g.shape[-1]).T @ x.reshape(-1, x.shape[-1]).to(g.dtype))

        with self.output_gradients(sites, outer):
            yield

    @contextmanager
    def _hooks(self, sites: list[Site], called: Callable[[Site, Tensor, Tensor], None]) -> Iterator[None]:
        def hook(site: Site) -> Callable[..., None]:
            def call(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
                x = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
                called(site, x.detach(), y[0] if isinstance(y, tuple) else y)

            return call

        hooks = [s.module.register_forward_hook(hook(s), with_kwargs=True) for s in sites]
        self.listening += len(hooks)
        try:
            yield
        finally:
            for one in hooks:
                one.remove()
            self.listening -= len(hooks)
