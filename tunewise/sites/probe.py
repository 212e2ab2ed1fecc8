"""A watched forward pass: how often each site is called, and whose weight is read without calling it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .site import Site

__all__ = ["Calls", "count_calls"]


@dataclass(frozen=True)
class Calls:
    """What one forward pass did with the sites, by site name, in model order."""

    count: dict[str, int]
    read_directly: list[str] = field(default_factory=list)

    @property
    def uncalled(self) -> list[str]:
        return [name for name, times in self.count.items() if times == 0]

    @property
    def repeated(self) -> list[str]:
        return [name for name, times in self.count.items() if times > 1]

    def notes(self) -> list[str]:
        """A sentence for each group of sites not simply called once; layer numbers are shown as *."""
        groups: Counter[tuple[str, str]] = Counter()
        for name, times in self.count.items():
            text = _note(times, name in self.read_directly)
            if text:
                groups[re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name), text] += 1
        return [
            f"{name}{f' ({n} sites, each)' if n > 1 else ''} {text}." for (name, text), n in groups.items()
        ]


def _note(times: int, read: bool) -> str:
    if times == 0 and read:
        return "is not called, but its weight is read directly: only a change of the weight acts there"
    often = {0: "is not called in this forward", 1: "is called" if read else ""}
    more = ", and its weight is also read while it is not running" if read else ""
    return often.get(times, f"is called {times} times in one forward") + more


class _Watch(TorchFunctionMode):
    """Notes which watched weights an operation makes a tensor of while none of their owners is running."""

    def __init__(self, owners: dict[int, list[nn.Module]], running: Counter[nn.Module]) -> None:
        super().__init__()
        self.owners, self.running, self.read = owners, running, set[int]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # Reading dtype, device or shape gives no tensor and changes nothing (T5 asks `wo` for its dtype).
        if any(True for _ in _tensors(result)):
            for tensor in _tensors((args, list((kwargs or {}).values()))):
                owners = self.owners.get(id(tensor), ())
                if owners and not any(self.running[owner] for owner in owners):
                    self.read.add(id(tensor))
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def count_calls(model: nn.Module, run: Callable[[], object], sites: Iterable[Site]) -> Calls:
    """Calls per site during `run()`, which makes one forward pass; the model is as before afterwards.

    Sites of one name (a fused linear narrowed twice) count together.  Gradient mode, train or eval are the
    caller's.  A compiled model must be probed uncompiled.  ValueError for a site of another model.
    """
    sites, own = list(sites), set(model.modules())
    missing = next((site for site in sites if site.module not in own), None)
    if missing is not None:
        raise ValueError(f"{missing.name} is no site of this model")
    modules = dict.fromkeys(site.module for site in sites)
    calls, running = Counter[nn.Module](), Counter[nn.Module]()
    owners: dict[int, list[nn.Module]] = {}
    for site in sites:
        if site.weight is not None:
            owners.setdefault(id(site.weight), []).append(site.module)

    def enter(module: nn.Module, inputs: object) -> None:
        calls[module] += 1
        running[module] += 1

    def leave(module: nn.Module, inputs: object, output: object) -> None:
        running[module] -= 1

    watch = _Watch(owners, running)
    handles = []
    try:
        for module in modules:
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave, always_call=True))
        with watch:
            run()
    finally:
        for handle in handles:
            handle.remove()
    read = dict.fromkeys(site.name for site in sites if id(site.weight) in watch.read)
    return Calls({site.name: calls[site.module] for site in sites}, list(read))
