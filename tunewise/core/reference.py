"""The model as it was, without a second copy of the backbone: only the adaptation's tensors are kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from .errors import UserError

if TYPE_CHECKING:
    from .handle import Handle

__all__ = ["Reference"]


class Reference:
    """`reference(**inputs)` gives an earlier model's outputs, without gradients and dropout; `with
    reference.active():` runs anything.

    "start" switches the adaptation off where that is exact and keeps only what it cannot (heads, non-identity
    starts); "previous" is taken at every boundary, "ema" follows each step: e <- decay e + (1 - decay) theta.
    """

    def __init__(self, handle: Handle, which: str, decay: float) -> None:
        self.handle, self.which, self.decay = handle, which, decay
        self.off = which == "start" and self._can_switch_off()
        infos = handle.tensors()
        if which in ("start", "previous", "ema"):
            kept = {n for n, i in infos.items() if not self.off or i.part.slot == "head"}
            if which == "start":
                kept -= {n for n in handle.existing if self.off}
            self.kept = {n: infos[n].tensor.detach().clone() for n in infos if n in kept}
            return
        path = Path(which) / "adaptation.safetensors"
        if not path.is_file():
            raise UserError(
                f'A reference is "start", "previous", "ema" or the folder of an adaptation, not "{which}".'
            )
        saved = load_file(path)
        missing = [n for n in infos if n not in saved]
        if missing:
            raise UserError(f"{path} has no tensor {missing[0]}: it belongs to another recipe.")
        self.kept = {n: saved[n] for n in infos}

    def _can_switch_off(self) -> bool:
        handle = self.handle
        return all(p.identity for _, p in handle.deltas if p.slot == "delta") and (
            handle.undo or not handle.existing
        )

    @contextmanager
    def active(self) -> Iterator[None]:
        """The earlier model for the time of a `with` block."""
        with ExitStack() as stack:
            live: dict[torch.nn.Parameter, Tensor] = {}
            infos = self.handle.tensors()
            for name, value in self.kept.items():
                tensor = infos[name].tensor
                live[tensor], tensor.data = tensor.data, value.to(tensor.device)
            if self.off:
                stack.enter_context(self.handle.disabled())
            try:
                yield
            finally:
                for tensor, data in live.items():
                    tensor.data = data

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> Any:
        modes = {module: module.training for module in self.handle.model.modules()}
        self.handle.model.eval()
        try:
            with self.active():
                return self.handle.model(**inputs)
        finally:
            for module, mode in modes.items():
                module.training = mode

    @torch.no_grad()
    def after_step(self) -> None:
        """The moving average takes a step."""
        if self.which == "ema":
            for name, info in self.handle.tensors().items():
                if name in self.kept and self.kept[name].shape == info.tensor.shape:
                    self.kept[name].lerp_(info.tensor.detach().to(self.kept[name].dtype), 1.0 - self.decay)
                else:
                    self.kept[name] = info.tensor.detach().clone()

    def boundary(self) -> None:
        """ "previous" moves on."""
        if self.which == "previous":
            self.kept = {n: i.tensor.detach().clone() for n, i in self.handle.tensors().items()}

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.kept, "off": self.off, "decay": self.decay}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kept, self.off, self.decay = state["kept"], state["off"], state["decay"]
