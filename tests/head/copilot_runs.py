"""Small pilots with a Copilot, and batches for them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.conformance.support import perturb
from tests.models import VOCAB, tiny
from tunewise.core.handle import attach
from tunewise.core.method import get_method, read_recipe
from tunewise.core.run import Run
from tunewise.data import Columns
from tunewise.head import LMHead
from tunewise.loop.settings import Settings
from tunewise.loop.single import Single
from tunewise.objective.task_loss import TaskLoss
from tunewise.optim.adamw import AdamW
from tunewise.task import make_task


class Tokens:
    """What collating needs of a tokenizer."""

    padding_side, pad_token_id, eos_token_id = "right", 0, 2


def rows(count: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    """Encoded rows of different lengths; the last four tokens are the answer."""
    make, found = torch.Generator().manual_seed(seed), []
    for i in range(count):
        ids = torch.randint(3, 40, (6 + i % 3,), generator=make).tolist()
        found.append(
            {"id": str(i), "input_ids": ids, "labels": [-100] * (len(ids) - 4) + ids[-4:], "length": len(ids)}
        )
    return found


def run_of(method: Any, folder: Path | None = None, **settings: Any) -> Run:
    """A run of causal rows on the tiny Llama."""
    recipe = read_recipe(method).with_defaults(
        head=LMHead(), objective=TaskLoss(), optimizer=AdamW(), loop=Single()
    )
    task: Any = make_task("causal", Columns(("prompt",), "answer", "causal"))
    model = tiny("llama")
    recipe.single("head").setup(task, Tokens(), model)  # type: ignore[union-attr]
    handle = attach(model, recipe, seed=0)
    options = {"lr": 1e-2, "batch_size": 4, "steps": 6, "evaluations": 0, "warmup": 0.0, **settings}
    data = {"train": rows(), "valid": rows(4, 1)}
    run = Run(handle, data=data, task=task, directory=folder, settings=Settings.of(**options))
    run.tokenizer = Tokens()
    torch.manual_seed(0)
    return run


def train(run: Run) -> dict[str, Tensor]:
    run.recipe.single("loop").run(run)  # type: ignore[union-attr]
    return {n: v.clone() for n, v in run.handle.state().items()}


def moved(name: str = "llama", **options: Any) -> tuple[Any, Any, Any]:
    """(model, handle, the Copilot's tensors), everything off its start."""
    model = tiny(name)
    handle = attach(model, get_method("copilot")(**options), seed=0)
    perturb(handle, 3)
    t = next(t for _, _, t in handle.sites if t.part.slot == "head")
    with torch.no_grad():
        t.words_out.mul_(0.3)
    return model, handle, t


def batch_of(lengths: tuple[int, ...] = (9, 6), pad: str = "right", labels: bool = True) -> Any:
    width = max(lengths)
    ids, mask = (
        torch.zeros(len(lengths), width, dtype=torch.long),
        torch.zeros(len(lengths), width, dtype=torch.long),
    )
    for i, n in enumerate(lengths):
        where = slice(width - n, width) if pad == "left" else slice(n)
        ids[i, where] = torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(i * 100 + n))
        mask[i, where] = 1
    answers = ids.masked_fill(mask == 0, -100) if labels else None
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    return SimpleNamespace(inputs=inputs, labels=answers, ids=[str(i) for i in range(len(lengths))])


def answer(model: Any, t: Any, batch: Any) -> Tensor:
    with torch.no_grad():
        outputs = model(**batch.inputs, output_hidden_states=True)
        return t.part.logits(t, outputs, batch)  # type: ignore[no-any-return]


def pair_batch() -> Any:
    make = torch.Generator().manual_seed(1)
    ids, labels = (
        torch.randint(3, VOCAB, (2, 7), generator=make),
        torch.randint(3, VOCAB, (2, 8), generator=make),
    )
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    decoder = torch.cat([torch.zeros(2, 1, dtype=torch.long), labels[:, :-1]], 1)
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": decoder}
    return SimpleNamespace(inputs=inputs, labels=labels, ids=["a", "b"])
