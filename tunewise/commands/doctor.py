"""`tunewise doctor`: does this environment work, and does this model?"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from .console import Output

__all__ = ["doctor"]

QUIET = Output()
PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "datasets",
    "scikit-learn",
    "peft",
    "pillow",
)
OPTIONAL = ("peft", "pillow")
Finding = tuple[str, bool, str]


def doctor(
    model: Annotated[str | None, Parameter(help="Also load this model and run it once.")] = None,
    /,
    *,
    output: Output = QUIET,
) -> None:
    """Test this environment, and with MODEL also that it loads, runs and shows its sites."""
    from tunewise.core.errors import RunError

    checks: list[Callable[[], Finding]] = [
        _python,
        _packages,
        _torchvision,
        _device,
        _memory,
        _cache,
        _assets,
    ]
    if model is not None:
        checks.append(lambda: _model(model))
    found = []
    for check in checks:
        name, good, text = check()
        found.append({"check": name, "good": good, "found": text})
        # The findings are the result of this command, so `--quiet` leaves out the good ones only.
        if not output.json and not (good and output.quiet):
            output.console.print(f"{'ok ' if good else 'BAD'}  {name:<12} {text}", markup=False)
    if output.json:
        output.result(found)
    bad = [f["check"] for f in found if not f["good"]]
    if bad:
        raise RunError(f"doctor found a problem with: {', '.join(str(b) for b in bad)}.")


def _python() -> Finding:
    good = sys.version_info >= (3, 11)
    where = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return "python", good, where + ("" if good else "; Tunewise needs 3.11 or newer")


def _packages() -> Finding:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} missing" + (" (optional)" if name in OPTIONAL else ""))
    return "packages", not any(f.endswith("missing") for f in found), ", ".join(found)


def _torchvision() -> Finding:
    if importlib.util.find_spec("torchvision") is None:
        return "torchvision", True, "not installed (not needed)"
    # In a process of its own: a torchvision of another build than torch can end the whole interpreter.
    tried = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True)
    if tried.returncode == 0:
        return "torchvision", True, "installed and importable"
    advice = "it does not fit this torch and breaks every import of transformers: pip uninstall torchvision"
    return "torchvision", False, advice


def _device() -> Finding:
    import torch

    kinds = []
    if torch.cuda.is_available():
        kinds += [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        kinds.append("mps")
    kinds.append(f"cpu ({os.cpu_count()} cores, {torch.get_num_threads()} threads)")
    return "device", True, ", ".join(kinds)


def _memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    return "memory", True, f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"


def _cache() -> Finding:
    from tunewise.assets import cache_dir

    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free / 2**30
    except OSError as error:
        return "cache", False, f"{folder} cannot be written ({error.strerror}): set TUNEWISE_CACHE"
    return "cache", True, f"{folder}, {free:.1f} GiB free"


def _assets() -> Finding:
    from tunewise.assets import MODELS, cache_dir

    folder = cache_dir() / "models"
    have = [n for n in MODELS if any(folder.glob(f"{n}-*/config.json"))]
    rest = [n for n in MODELS if n not in have]
    fetched = f"; fetched on first use: {', '.join(rest)}" if rest else ""
    return "demo models", True, f"offline: {', '.join(have) or 'none'}{fetched}"


def _model(name: str) -> Finding:
    """Loads the model, runs it once on a few tokens, and counts its sites."""
    import torch

    from tunewise.backbone import load
    from tunewise.sites import find_sites

    start = time.perf_counter()
    model, tokenizer = load(name)
    loaded = time.perf_counter() - start
    model.eval()
    with torch.no_grad():
        model(**_inputs(model, tokenizer))
    kinds = Counter(site.kind for site in find_sites(model))
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    size = sum(p.numel() for p in model.parameters())
    folder = f" from {name}" if Path(name).exists() else ""
    kind = type(model).__name__
    return (
        "model",
        bool(kinds),
        f"{kind}{folder}, {size:,} parameters, loaded in {loaded:.1f} s; sites: {counts}",
    )


def _inputs(model: Any, tokenizer: Any) -> dict[str, Any]:
    import torch

    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        config = model.config
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        return {"pixel_values": torch.zeros(1, getattr(config, "num_channels", 3), size, size)}
    return dict(tokenizer(["A first sentence."], return_tensors="pt"))
