"""What side networks save: memory of a training step against LoRA's, and epochs after the first.

    python -m benchmarks.side [--only memory lst]      # one thread; writes benchmarks/results/side.json

Memory: smollm2, 4 rows of 256 tokens, the peak of a fresh process above its loaded base model (gradients, moments,
activations, logits), for each side network against LoRA of rank 8, Tunewise's own and PEFT's. Epochs: minilm on
`reviews` (VQT: dinov2-small on `fashion`), CPU seconds of each epoch, looks left out: the first computes the states of
all rows, later ones read them from memory or from a folder. Equal results: losses and tensors against a run that
computes everything anew. The first training rows are taken; an epoch's share of another does not depend on how many
there are. Later epochs of VQT cost what its queries cost, which go forward and back through every block: at 224 pixels,
as published, 5 queries stand beside 257 tokens, at 56 pixels beside 17.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.steps_vs_peft import LORA, Row, peak_of

RESULTS = Path(__file__).parent / "results" / "side.json"
MEMORY = {
    "lora": "lora(rank=8)",
    "lst": "lst",
    "qst": "qst",
    "unipt": "unipt",
    "levi": "levi",
    "ladder": "ladder",
}


@dataclass(frozen=True)
class Case:
    """Whose epochs are measured: a method, a model, that many rows of a data set, images of so many pixels."""

    method: str
    model: str
    data: str
    rows: int
    image_size: int | None = None


EPOCHED = {
    "lst": Case("lst", "minilm", "reviews", 512),
    "unipt": Case("unipt", "minilm", "reviews", 512),
    "vqt": Case("vqt", "dinov2-small", "fashion", 64, 224),
    "vqt small": Case("vqt", "dinov2-small", "fashion", 256, 56),
}
MEMORY_BAR, EPOCH_BAR, LOSS_BAR = 0.5, 0.25, 1e-3
EPOCHS = 3


def peak(method: str, side: str) -> float:
    """MiB of a training step, in a process of its own."""
    import multiprocessing

    with multiprocessing.get_context("spawn").Pool(1) as pool:
        row = Row("smollm2", method, "LoraConfig", LORA, 1.0)
        return float(pool.apply(_peak, (asdict(row), side)))


def _peak(row: dict[str, Any], side: str) -> float:
    import torch

    torch.set_num_threads(1)
    return float(peak_of(Row(**row), side)["mib"])


def memory() -> dict[str, Any]:
    """Peaks above the base model and their ratios to LoRA's."""
    mib: dict[str, float] = {}
    for name, method, side in [
        *((n, m, "ours") for n, m in MEMORY.items()),
        ("peft lora", "lora(rank=8)", "theirs"),
    ]:
        mib[name] = peak(method, side)
        print(json.dumps({"method": name, "mib": mib[name]}), flush=True)
    to = {name: {"ours": m / mib["lora"], "peft": m / mib["peft lora"]} for name, m in mib.items()}
    return {"mib": mib, "of_lora": to, "bar": MEMORY_BAR, "within": to["lst"]["ours"] <= MEMORY_BAR}


def epochs_of(case: Case, folder: str | None, keep: bool) -> dict[str, Any]:
    """Seconds of every epoch, the losses of all steps and what was learnt."""
    import torch

    from tunewise.core.handle import attach
    from tunewise.core.run import Run
    from tunewise.loop.feature_folder import FeatureFolder
    from tunewise.loop.features import frozen_features
    from tunewise.loop.settings import Settings
    from tunewise.machine import seed_everything
    from tunewise.prepare import default_sizes, encode, load_base, prepare_data

    data = prepare_data(case.data, say=lambda sentence: None, image_size=case.image_size)
    seed_everything(0)
    prepared = load_base(case.model, None, case.method, data, torch.device("cpu"), lambda sentence: None)
    data.splits.train = data.splits.train[: case.rows]
    encode(prepared, ("train",), lambda sentence: None)
    handle = attach(prepared.model, prepared.recipe, seed=0)
    settings = Settings.of(lr=1e-3, epochs=EPOCHS, evaluations=0, **default_sizes("classification", "cpu"))
    run = Run(handle, data={"train": prepared.examples["train"]}, task=data.task, settings=settings)
    run.tokenizer = prepared.tokenizer
    losses: list[float] = []
    ends: list[float] = []

    def listen(row: dict[str, Any]) -> None:
        losses.append(row["loss"])
        if len(losses) % steps == 0:
            ends.append(time.process_time())

    steps = -(-len(prepared.examples["train"]) // settings.batch_size)
    run.listen = listen
    store: Any = FeatureFolder(folder) if folder else {}
    with frozen_features(run, store, limit_bytes=2**33 if keep else 0, order=0 if keep else None) as features:
        ends.append(time.process_time())
        run.recipe.single("loop").run(run)  # type: ignore[union-attr]
    seconds = [b - a for a, b in zip(ends, ends[1:], strict=False)]
    state = torch.cat([v.flatten().double() for v in handle.state().values()])
    facts = {"blocks": features.blocks, "reason": features.reason, "mb": features.used / 2**20}
    return {"seconds": seconds, "losses": losses, "state": state, **facts}


def epochs(case: Case) -> dict[str, Any]:
    """The later epochs' share of the first, and how far results are apart."""
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            "anew": epochs_of(case, None, keep=False),
            "memory": epochs_of(case, None, keep=True),
            "folder": epochs_of(case, folder, keep=True),
            "next run": epochs_of(case, folder, keep=True),
        }
    anew, lines = runs["anew"], {}
    for name, one in runs.items():
        first, *later = one["seconds"]
        whole = runs["folder"]["seconds"][0] if name == "next run" else first
        lines[name] = {k: v for k, v in one.items() if k not in ("losses", "state")} | {
            "second_epoch": later[0] / whole,
            "later_epochs": statistics.median(later) / whole,
            "largest_loss_difference": max(
                abs(a - b) for a, b in zip(one["losses"], anew["losses"], strict=True)
            ),
            "relative_state_difference": float((one["state"] - anew["state"]).norm() / anew["state"].norm()),
        }
        print(json.dumps({"method": case.method, "states": name, **lines[name]}), flush=True)
    kept = [lines[name] for name in ("memory", "folder")]
    return {
        **asdict(case),
        "runs": lines,
        "bar": EPOCH_BAR,
        "within": all(one["second_epoch"] <= EPOCH_BAR for one in kept),
        "equal": all(one["largest_loss_difference"] <= LOSS_BAR for one in kept),
    }


def main() -> None:
    import torch

    from tunewise.core.checkpoint import write_json
    from tunewise.machine import environment

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parts = ("memory", *EPOCHED)
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="the other figures are kept")
    given = parser.parse_args()
    torch.set_num_threads(1)
    new: dict[str, Any] = {}
    for part in given.only:
        new[part] = memory() if part == "memory" else epochs(EPOCHED[part])
        known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
        write_json(RESULTS, known | new | {"environment": environment()})


if __name__ == "__main__":
    main()
