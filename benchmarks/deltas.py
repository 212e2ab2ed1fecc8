"""Every delta method on small real data: three rates, three seeds, the same steps for all, against the linear probe.

    python benchmarks/deltas.py --workers 2              # resumable, one row per run in results/deltas.jsonl
    python benchmarks/deltas.py --methods lora,dora      # only these
    python benchmarks/deltas.py --summary                # writes benchmarks/results/deltas.json
    python benchmarks/deltas.py --setting vision         # the same on images: results/vision.jsonl, results/vision.json

Model tiny-roberta, data `peptides`, two epochs; or the methods made for images, beside a few others, on dinov2-small
and rows of `fashion`. Everything else as `tune` does it. What counts is the loss of the validation rows at the state
that `tune` keeps (its best look). Every rate is run with seed 0; the rate that leads
by its mean is run with seeds 1 and 2, until the leader has all three: a rate that only one seed likes loses its
lead. There at least nine of ten methods must end below the linear probe, solved exactly on the same rows. Prompts leave
the backbone as it is; they are read out as the probe reads it, by a linear layer on the mean of the states, and not
by the model's classifier on the first token. Those that are the same for all rows learn slowly (their publications
train them for tens of epochs): here they have six.
Seconds per step are CPU time of one thread, looks included.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

import tunewise as tw
from tunewise.core.checkpoint import write_json, write_text
from tunewise.core.errors import RunError, UserError, did_you_mean
from tunewise.core.method import get_method, read_recipe
from tunewise.data import Splits
from tunewise.delta.prefix import Prefix
from tunewise.delta.prompt import SoftPrompt
from tunewise.delta.prompt_generator import PromptGenerator
from tunewise.machine import environment
from tunewise.prepare import prepare_data
from tunewise.study.portfolio import read_methods

RESULTS = Path(__file__).parent / "results"
AREAS = ("lowrank", "spectral", "sparse", "existing", "adapters", "experts", "prompt", "head", "side")
SPELLED = {
    "zecoler": "zecoler(verbalizer={'AMP': 'K', 'UniProt': 'L'})",
    "unipt": "unipt(variant='projected')",  # what its authors use for encoders of text
}
"""Methods that need to know more about this data than their defaults say."""
READ_OUT, LONGER = "PooledHead()", 3
"""The head of prompts for texts, and how many times as long those are trained that are the same for all rows."""
PROBE = "linear_probe"
SEEDS = (0, 1, 2)
LOOKS = 2
"""At the validation rows; each costs as much as ten steps."""
BAR = 0.9


@dataclass(frozen=True)
class Setting:
    """A model, its data and how long it is trained; `file` is the name of the results, without its ending.

    names  of the methods; None: all of AREAS
    train, valid  the first rows of these sets; None: all
    """

    file: str
    model: str
    data: str
    steps: int
    names: tuple[str, ...] | None = None
    train: int | None = None
    valid: int | None = None


TEXT = Setting("deltas", "tiny-roberta", "peptides", 188)
PICTURED = ("vpt", "vqt", "hst", "dvpt", "idpt", "lora", "bitfit", "houlsby", "pfeiffer", "head_only")
SETTINGS = {
    "text": TEXT,
    "vision": Setting("vision", "dinov2-small", "fashion", 64, PICTURED, train=500, valid=250),
}


@dataclass(frozen=True)
class Job:
    """One run; the probe has no rate, no seed and no steps."""

    method: str
    lr: float | None
    seed: int
    steps: int | None


def quiet(sentence: str) -> None:
    """Nothing is said here."""


@cache
def rows(setting: Setting) -> Splits:
    """The three sets, read once per process."""
    sets = prepare_data(setting.data, say=quiet).splits
    return Splits(sets.train[: setting.train], sets.valid[: setting.valid], sets.test)


def run(job: Job, setting: Setting = TEXT) -> dict[str, Any]:
    """The row of one run; one that fails (a loss that became NaN) gives the reason instead of figures."""
    started: list[float] = []

    def say(sentence: str) -> None:
        started[:] = [time.process_time()]  # the last sentence is said when training begins

    sets, recipe = rows(setting), spelled(job.method, setting)
    found = {**vars(job), "recipe": recipe, "threads": torch.get_num_threads()}
    try:
        metrics = tw.tune(
            setting.model,
            sets.train,
            valid=sets.valid,
            test=sets.test,
            method=recipe,
            lr=job.lr,
            steps=job.steps,
            seed=job.seed,
            final_test=False,
            device="cpu",
            options={"evaluations": LOOKS},
            say=say,
        ).metrics
    except RunError as error:
        return {**found, "failed": str(error)}
    except Exception as error:  # the other methods go on; `--again` tries what failed once more
        return {**found, "failed": f"{type(error).__name__}: {error}"}
    return {
        **found,
        "loss": metrics["valid/loss"],
        "accuracy": metrics["valid/accuracy"],
        "trainable": metrics["trainable"],
        "seconds": metrics["seconds"],
        "cpu_seconds": time.process_time() - started[0],
        "peak_memory_mb": metrics["peak_memory_mb"],
    }


def is_prompt(name: str, setting: Setting) -> bool:
    """Whether it is a prompt for texts without a head of its own."""
    prompts = setting == TEXT and get_method(name).area == "prompt"
    return prompts and "head" not in read_recipe(name).essential


def spelled(name: str, setting: Setting = TEXT) -> str:
    """The recipe of a method."""
    return f"{name} + {READ_OUT}" if is_prompt(name, setting) else SPELLED.get(name, name)


def length(name: str, steps: int, setting: Setting = TEXT) -> int:
    """The steps of a method where the others have `steps`."""
    prompts = setting == TEXT and get_method(name).area == "prompt"
    parts = read_recipe(name)["delta"] if prompts else []
    same = [isinstance(p, SoftPrompt | Prefix) and not isinstance(p, PromptGenerator) for p in parts]
    return steps * LONGER if same and all(same) else steps


def methods(named: str | None, setting: Setting = TEXT) -> list[str]:
    """The named methods, or all of the setting's."""
    everything = [n for n in read_methods("all") if get_method(n).area in AREAS and n != PROBE]
    everything = list(setting.names or everything)
    chosen = [n.strip() for n in named.split(",")] if named else everything
    for name in chosen:
        if name not in everything:
            raise UserError(f'No method "{name}" is compared here{did_you_mean(name, everything)}')
    return chosen


def first_jobs(chosen: Iterable[str], steps: int, setting: Setting = TEXT) -> Iterator[Job]:
    """The probe, and every rate of every method with the first seed."""
    yield Job(PROBE, None, 0, None)
    for name in chosen:
        for lr in get_method(name).lr:
            yield Job(name, lr, SEEDS[0], length(name, steps, setting))


def further_jobs(chosen: Iterable[str], kept: Rows, steps: int, setting: Setting = TEXT) -> Iterator[Job]:
    """The other seeds of the rate that leads by the mean over the seeds run so far."""
    for name in chosen:
        mine = length(name, steps, setting)
        lr = best_rate(kept, name, mine)
        if lr is not None:
            yield from (Job(name, lr, seed, mine) for seed in SEEDS)


def best_rate(kept: Rows, name: str, steps: int) -> float | None:
    """By the mean over the seeds run so far; None where every rate failed, or one has not been run."""
    means = []
    for lr in get_method(name).lr:
        losses = [r.get("loss", math.inf) for r in kept.rows if rate_of(r) == (name, lr, steps)]
        if not losses:
            return None
        means.append((statistics.mean(losses), lr))
    mean, lr = min(means)
    return lr if math.isfinite(mean) else None


def rate_of(row: dict[str, Any]) -> tuple[str, float | None, int | None]:
    """What runs of different seeds have in common."""
    return row["method"], row["lr"], row["steps"]


class Rows:
    """Rows of finished runs in a file; what is there is not run again."""

    def __init__(self, file: Path, again: bool = False) -> None:
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        rows = [json.loads(line) for line in lines]
        self.file, self.rows = file, [r for r in rows if not (again and "failed" in r)]

    def __contains__(self, job: Job) -> bool:
        return any(all(row[k] == v for k, v in vars(job).items()) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """The file holds the row, or is as it was."""
        self.rows.append(row)
        write_text(self.file, "".join(json.dumps(r) + "\n" for r in self.rows))
        print(json.dumps(row), flush=True)


def one_thread() -> None:
    """Workers side by side do not crowd each other out."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)


def carry_out(kept: Rows, todo: list[Job], workers: int, setting: Setting) -> None:
    """Runs what is missing; rows are written as runs end."""
    print(f"{len(todo)} runs are missing.", flush=True)
    one_thread()
    if workers == 1:
        for job in todo:
            kept.add(run(job, setting))
        return
    with multiprocessing.get_context("spawn").Pool(workers, one_thread) as pool:
        for row in pool.imap_unordered(partial(run, setting=setting), todo):
            kept.add(row)


def summary(kept: Rows, steps: int, setting: Setting = TEXT) -> dict[str, Any]:
    """Each method at its best rate beside the probe; methods without all of their runs are named apart."""
    probe = next((r for r in kept.rows if r["method"] == PROBE), None)
    if probe is None:
        raise UserError(f"{kept.file} holds no run of the linear probe.")
    found: dict[str, Any] = {}
    unfinished = []
    for name in methods(None, setting):
        its = length(name, steps, setting)
        mine = [r for r in kept.rows if r["method"] == name and r["steps"] == its]
        rates = {lr: [r for r in mine if r["lr"] == lr] for lr in get_method(name).lr}
        lr = best_rate(kept, name, its)
        tried = all(rates.values())
        if tried and (lr is None or {r["seed"] for r in rates[lr]} == set(SEEDS)):
            found[name] = of_method(rates, lr, probe["loss"])
        else:
            unfinished.append(name)
    of_steps = partial(length, steps=steps, setting=setting)
    below = [name for name, one in found.items() if one["below_probe"]]
    areas: dict[str, list[bool]] = {}
    for name, one in found.items():
        areas.setdefault(get_method(name).area, []).append(one["below_probe"])
    return {
        "environment": environment() | {"threads": 1},
        **{k: v for k, v in vars(setting).items() if k not in ("file", "steps", "names") and v is not None},
        "steps": steps,
        "seeds": list(SEEDS),
        "probe": {k: probe[k] for k in ("loss", "accuracy", "trainable")},
        "bar": BAR,
        "share_below": len(below) / len(found) if found else 0.0,
        "share_below_by_area": {a: statistics.mean(b) for a, b in sorted(areas.items())},
        "above": {n: one["loss"] for n, one in found.items() if not one["below_probe"]},
        "unfinished": unfinished,
        "methods": found,
        "rows": [r for r in kept.rows if r["method"] == PROBE or r["steps"] == of_steps(r["method"])],
    }


def of_method(rates: dict[float, list[dict[str, Any]]], lr: float | None, probe: float) -> dict[str, Any]:
    """Figures at the chosen rate, over its seeds; where every rate failed, the reasons."""
    failed = {str(rate): [r["failed"] for r in runs if "failed" in r] for rate, runs in rates.items()}
    failed = {rate: reasons for rate, reasons in failed.items() if reasons}
    if lr is None:
        return {"lr": lr, "loss": None, "below_probe": False, "failed": failed}
    runs = rates[lr]
    firsts = {str(r["lr"]): r["loss"] for of in rates.values() for r in of if r["seed"] == 0 and "loss" in r}
    losses = [r["loss"] for r in runs]
    mean = statistics.mean(losses)
    return {
        "recipe": runs[0].get("recipe", runs[0]["method"]),
        "steps": runs[0]["steps"],
        "lr": lr,
        "loss": mean,
        "loss_min": min(losses),
        "loss_max": max(losses),
        "accuracy": statistics.mean(r["accuracy"] for r in runs),
        "trainable": runs[0]["trainable"],
        "seconds_per_step": statistics.median(r["cpu_seconds"] / r["steps"] for r in runs),
        "peak_memory_mb": max(r["peak_memory_mb"] for r in runs),
        "below_probe": mean < probe,
        "loss_by_rate": firsts,
        "failed": failed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", help="names with commas between them; all by default")
    parser.add_argument("--setting", choices=list(SETTINGS), default="text")
    parser.add_argument("--steps", type=int, help="per run; by default the setting's")
    parser.add_argument("--workers", type=int, default=1, help="processes side by side, one thread each")
    parser.add_argument("--summary", action="store_true", help="sum up what was run, run nothing")
    parser.add_argument("--again", action="store_true", help="also run what failed before")
    parser.add_argument("--rows", type=Path, help="file of the rows")
    parser.add_argument("--out", type=Path, help="file of the summary")
    options = parser.parse_args()
    setting = SETTINGS[options.setting]
    kept = Rows(options.rows or RESULTS / f"{setting.file}.jsonl", options.again)
    steps = options.steps or setting.steps
    if options.summary:
        found = summary(kept, steps, setting)
        write_json(options.out or RESULTS / f"{setting.file}.json", found)
        print(json.dumps({k: v for k, v in found.items() if k not in ("methods", "rows")}, indent=1))
        return
    chosen = methods(options.methods, setting)
    carry_out(
        kept, [job for job in first_jobs(chosen, steps, setting) if job not in kept], options.workers, setting
    )
    while todo := [job for job in further_jobs(chosen, kept, steps, setting) if job not in kept]:
        carry_out(kept, todo, options.workers, setting)


if __name__ == "__main__":
    main()
