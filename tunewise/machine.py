"""The machine: device, seeds, memory, and what a result must say about where it was made."""

from __future__ import annotations

import os
import platform
import random
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from tunewise.core.errors import UserError, did_you_mean

__all__ = ["PeakMemory", "environment", "pick_device", "resident", "seed_everything"]

PACKAGES = ("tunewise", "torch", "transformers", "accelerate", "safetensors", "datasets", "scikit-learn")


def pick_device(name: str = "auto") -> Any:
    """`auto` is CUDA, then MPS, then the CPU; raises `UserError` for a device that is not there."""
    import torch

    if name == "auto":
        found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(found)
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (index and not index.isdigit()):
        raise UserError(f'There is no device "{name}"{did_you_mean(kind, ("auto", "cpu", "cuda", "mps"))}')
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise UserError(
            f'The device "{name}" is not there: torch sees {torch.cuda.device_count()} CUDA devices.'
        )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError('The device "mps" is not there.')
    return torch.device(name)


def seed_everything(seed: int) -> None:
    """Seeds python, numpy and torch, all devices."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class PeakMemory:
    """Peak bytes since the start of the `with` block: of the process on a CPU, of the allocator on a GPU."""

    def __init__(self, device: Any) -> None:
        self.device, self.bytes, self._before = device, 0, 0

    def __enter__(self) -> PeakMemory:
        import torch

        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            _reset_high_water()
        return self

    def __exit__(self, *_: object) -> None:
        self.read()

    def read(self) -> int:
        """The peak so far."""
        import torch

        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        else:
            self.bytes = _high_water()
        return self.bytes


def _reset_high_water() -> None:
    """Linux can forget a process's earlier peak; elsewhere the peak is of the whole life of the process."""
    if os.path.exists("/proc/self/clear_refs"):
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        except PermissionError:
            return


def _high_water() -> int:
    if os.path.exists("/proc/self/status"):
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith("VmHWM"):
                    return int(line.split()[1]) * 1024
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident() -> int:
    """Bytes of memory that this process takes now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def environment(device: Any = None) -> dict[str, Any]:
    """Versions and hardware, as they stand in every result."""
    import torch

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    found |= {"threads": torch.get_num_threads(), "cpus": os.cpu_count(), "device": str(device or "cpu")}
    if device is not None and device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found
