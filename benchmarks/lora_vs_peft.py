"""One training step of LoRA (rank 8, all linear layers of the blocks) against PEFT's, pair by pair in one process.

python benchmarks/lora_vs_peft.py        # writes benchmarks/results/lora_vs_peft.json, one thread, CPU time
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch

import tunewise as tw
from tunewise.core.checkpoint import write_json
from tunewise.machine import environment

PAIRS = 9
TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]


def batch(rows: int = 32, tokens: int = 64) -> dict[str, torch.Tensor]:
    """Random token ids without padding, as in the published comparison."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (rows, tokens), generator=generator)
    labels = torch.randint(0, 2, (rows,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def stepper(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    """Forward, backward, AdamW, zero_grad."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    model.train()

    def step() -> None:
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def base() -> torch.nn.Module:
    """minilm with a class head, its own dropout off."""
    model, _ = tw.load("minilm", auto="sequence_classification", labels=["a", "b"])
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def compare(dropout: float) -> dict[str, Any]:
    """Ratio of CPU time, ours to PEFT's: the median over alternating pairs."""
    inputs = batch()
    theirs = peft.get_peft_model(
        base(),
        peft.LoraConfig(
            r=8, lora_alpha=16, lora_dropout=dropout, target_modules=TARGETS, task_type="SEQ_CLS"
        ),
    )
    mine = base()
    tw.attach(mine, f"lora(rank=8, alpha=16, dropout={dropout}) + ClassHead(pooler=False)")
    steps = {"peft": stepper(theirs, inputs), "tunewise": stepper(mine, inputs)}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(2):
        for step in steps.values():
            step()
    for _ in range(PAIRS):
        for name, step in steps.items():
            start = time.process_time()
            step()
            times[name].append(time.process_time() - start)
    ratios = [a / b for a, b in zip(times["tunewise"], times["peft"], strict=True)]
    return {
        "dropout": dropout,
        "ratio": statistics.median(ratios),
        "ratios": sorted(ratios),
        "seconds": {name: statistics.median(values) for name, values in times.items()},
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    rows = [compare(0.0), compare(0.1)]
    target = Path(__file__).parent / "results" / "lora_vs_peft.json"
    write_json(target, {"environment": environment() | {"peft": peft.__version__}, "rows": rows})
    print(json.dumps(rows, indent=1))
