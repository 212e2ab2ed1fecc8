"""Time and memory of one training step against PEFT's, or against full fine-tuning's, row by row.

python benchmarks/steps_vs_peft.py [ROW ...] [--pairs 7] [--again]        # --list shows the rows

Time: CPU seconds of one thread, both sides in one process, the median ratio of alternating pairs. Memory: the
peak of a fresh process of either side above its loaded base model, so gradients, moments and activations. A row
that stands in benchmarks/results/steps_vs_peft.json already is not measured again without --again.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "steps_vs_peft.json"
ENCODER = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
DECODER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {"r": 8, "lora_alpha": 16}
STEPS = 4
"""Of a process whose peak is read: moments exist after the first, and memory is used again after the second."""


@dataclass(frozen=True)
class Row:
    """Our method against PEFT's of these options (none: full fine-tuning), and the most that each ratio may be."""

    model: str
    method: str
    kind: str | None
    options: dict[str, Any]
    time: float
    memory: float | None = None
    half: bool = False


def _lora(model: str, method: str, time: float, memory: float, half: bool = False, **options: Any) -> Row:
    return Row(model, method, "LoraConfig", {**LORA, **options}, time, memory, half)


DENSE = ("loha(rank=8)", "lokr(rank=8)", "fourierft(frequencies=1000)", "loca", "hut", "weight_compander")
DENSE += ("weight_mixup", "oft", "snell", "miss", "r_amt", "random_sparse")
"""Deltas that are a dense function of W, or scattered over it, against full fine-tuning of the same layers."""
ROWS = {
    "lora": _lora("minilm", "lora(rank=8)", 0.90, 0.95),
    "lora dropout": _lora("minilm", "lora(rank=8, dropout=0.1)", 0.80, 0.75, lora_dropout=0.1),
    "dora": _lora("minilm", "dora(rank=8)", 0.80, 0.70, use_dora=True),
    "dora dropout": _lora("minilm", "dora(rank=8, dropout=0.1)", 0.55, 0.55, use_dora=True, lora_dropout=0.1),
    "loha": Row("minilm", "loha(rank=8)", "LoHaConfig", {"r": 8}, 0.70, 1.0),
    "lokr": Row("minilm", "lokr(rank=8)", "LoKrConfig", {"r": 8}, 0.70, 1.0),
    "fourierft": Row(
        "minilm", "fourierft(frequencies=1000)", "FourierFTConfig", {"n_frequency": 1000}, 0.70, 1.0
    ),
    "decoder lora": _lora("smollm2", "lora(rank=8)", 1.02, 0.62),
    "decoder lora bf16": _lora("smollm2", "lora(rank=8)", 0.90, 0.60, half=True),
    "decoder dora": _lora("smollm2", "dora(rank=8)", 0.92, 0.52, use_dora=True),
    **{f"{name.partition('(')[0]}, full": Row("minilm", name, None, {}, 1.15) for name in DENSE},
}

SHORTFALLS = {
    "snell, full": "Two kernels of distances and a quantile over all entries per site, forward and again backward."
}
"""Why a row is not within its bar."""


def base(row: Row) -> Any:
    """The pretrained model, its own dropout off, in the row's precision."""
    import torch

    import tunewise as tw

    head: dict[str, Any] = {"auto": "sequence_classification", "labels": ["a", "b", "c", "d"]}
    model, _ = tw.load(row.model, **(head if row.model == "minilm" else {"auto": "causal_lm"}))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config.use_cache = False
    return model.bfloat16() if row.half else model


def batch(row: Row) -> dict[str, Any]:
    """Random tokens without padding: 32 rows of 64 with a class each, or 4 of 256 that are all learnt."""
    import torch

    make = torch.Generator().manual_seed(0)
    shape, words = ((32, 64), (1000, 20000)) if row.model == "minilm" else ((4, 256), (100, 40000))
    ids = torch.randint(*words, shape, generator=make)
    labels = torch.randint(0, 4, (32,), generator=make) if row.model == "minilm" else ids.clone()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def theirs(row: Row, model: Any) -> tuple[Callable[[], Any], int]:
    """(loss of one batch, trained scalars without the head)."""
    inputs = batch(row)
    if row.kind is not None:
        import peft

        encoder = row.model == "minilm"
        targets, task = (ENCODER, "SEQ_CLS") if encoder else (DECODER, "CAUSAL_LM")
        config = getattr(peft, row.kind)(target_modules=targets, task_type=task, **row.options)
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=not row.half)
    model.train()
    trained = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "classifier" not in n)
    return lambda: model(**inputs).loss, trained


def ours(row: Row, model: Any, keep: contextlib.ExitStack) -> tuple[Callable[[], Any], int]:
    """The same; a language model's loss is the run's own, from hidden states, inside lean layers."""
    import torch

    from tunewise.core.handle import attach
    from tunewise.core.method import read_recipe
    from tunewise.core.run import Run
    from tunewise.data import Columns
    from tunewise.delta.half_attention import HalfAttention
    from tunewise.delta.lean import lean
    from tunewise.head import ClassHead, LMHead
    from tunewise.objective.task_loss import TaskLoss
    from tunewise.task import make_task
    from tunewise.task.base import Batch

    encoder = row.model == "minilm"
    head = ClassHead(pooler=False) if encoder else LMHead()
    recipe = read_recipe(row.method).with_defaults(head=head, objective=TaskLoss())
    handle = attach(model, recipe, dtype=torch.bfloat16 if row.half else torch.float32)
    trained = sum(i.tensor.numel() for n, i in handle.tensors().items() if "classifier" not in n)
    model.train()
    inputs = batch(row)
    if encoder:
        return lambda: model(**inputs).loss, trained
    keep.enter_context(lean(model))
    labels = inputs.pop("labels")
    labels[:, 0] = -100
    units = (labels != -100).sum(1).float()
    one = Batch(inputs, labels, [str(i) for i in range(len(labels))], units)
    run = Run(handle, task=make_task("causal", Columns(("text",), None, "causal")))

    def loss() -> Any:
        with (
            HalfAttention() if row.half else contextlib.nullcontext()
        ):  # as the loop does; not for the other side
            return run.loss(one, float(units.sum()))

    return loss, trained


@contextlib.contextmanager
def stepper(row: Row, side: str, model: Any) -> Iterator[tuple[Callable[[], None], int]]:
    """(forward, backward, AdamW, zero_grad; trained scalars)."""
    import torch

    with contextlib.ExitStack() as keep:
        loss, trained = ours(row, model, keep) if side == "ours" else theirs(row, model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

        def step() -> None:
            loss().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        yield step, trained


def time_row(row: Row, pairs: int) -> dict[str, Any]:
    """Ratios of CPU time, ours to theirs, pair by pair."""
    sides = stepper(row, "theirs", base(row)), stepper(row, "ours", base(row))
    with sides[0] as (other, wanted), sides[1] as (mine, trained):
        if row.kind is not None and trained != wanted:
            raise SystemExit(f"{row.method} trains {trained:,} scalars, PEFT's {wanted:,}.")
        seconds: dict[str, list[float]] = {"theirs": [], "ours": []}
        other()
        mine()
        for _ in range(pairs):
            for name, step in (("theirs", other), ("ours", mine)):
                start = time.process_time()
                step()
                seconds[name].append(time.process_time() - start)
    ratios = sorted(a / b for a, b in zip(seconds["ours"], seconds["theirs"], strict=True))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"time": statistics.median(ratios), "ratios": ratios, "seconds": medians, "trained": trained}


def peak_of(row: Row, side: str) -> dict[str, Any]:
    """MiB above the loaded base model."""
    import torch

    from tunewise.machine import PeakMemory, resident

    model = base(row)
    for p in model.parameters():  # weights of a mapped file are in memory once they have been read
        p.detach().sum()
    gc.collect()
    before = resident()
    with PeakMemory(torch.device("cpu")) as memory, stepper(row, side, model) as (step, _):
        for _ in range(STEPS):
            step()
    return {"mib": (memory.bytes - before) / 2**20}


def asked(*words: str) -> dict[str, Any]:
    """What a fresh process of this script answers."""
    command = [sys.executable, __file__, *words]
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=alone, stdout=subprocess.PIPE, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def measured(name: str, pairs: int) -> dict[str, Any]:
    """One line of the result file."""
    row = ROWS[name]
    found = {**asked(name, "--time", "--pairs", str(pairs)), "bars": {"time": row.time, "memory": row.memory}}
    if row.memory is not None:
        peaks = {side: asked(name, "--peak", side)["mib"] for side in ("theirs", "ours")}
        found |= {"mib": peaks, "memory": peaks["ours"] / peaks["theirs"]}
    within = found["time"] <= row.time and (row.memory is None or found["memory"] <= row.memory)
    return {**found, "method": row.method, "against": row.kind or "full fine-tuning", "within": within}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW")
    parser.add_argument("--pairs", type=int, default=7)
    for flag in ("--again", "--list", "--time"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--peak", choices=("theirs", "ours"))
    given = parser.parse_args()
    unknown = [name for name in given.rows if name not in ROWS]
    if given.list or unknown:
        raise SystemExit(f"There is no row {unknown[0]!r}: {', '.join(ROWS)}" if unknown else "\n".join(ROWS))
    if given.time or given.peak:
        import torch

        torch.set_num_threads(1)
        row = ROWS[given.rows[0]]
        print(json.dumps(time_row(row, given.pairs) if given.time else peak_of(row, given.peak)))
        return
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"rows": {}}
    for name in given.rows or ROWS:
        if name in known["rows"] and not given.again:
            continue
        known["rows"][name] = line = measured(name, given.pairs)
        _write(known)
        memory = f", memory {line['memory']:.2f} of {line['bars']['memory']}" if "memory" in line else ""
        print(f"{name}: time {line['time']:.2f} of {line['bars']['time']}{memory}", flush=True)


def _write(known: dict[str, Any]) -> None:
    import peft

    from tunewise.core.checkpoint import write_json
    from tunewise.machine import environment

    rows = {name: known["rows"][name] for name in ROWS if name in known["rows"]}
    for name, why in SHORTFALLS.items():
        if name in rows and not rows[name]["within"]:
            rows[name]["shortfall"] = why
    facts = environment() | {"peft": peft.__version__, "threads": 1}
    write_json(RESULTS, {"environment": facts, "rows": rows})


if __name__ == "__main__":
    main()
