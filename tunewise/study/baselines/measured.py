"""Baselines: what fine-tuning has to beat, with and without the pretrained model."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tunewise.core.errors import UserError, did_you_mean
from tunewise.study.baselines.fitted import FITTED, sample

if TYPE_CHECKING:
    from torch import nn

    from tunewise.study.baselines.passes import Passes, Tick
    from tunewise.task import Task

__all__ = ["PROMPTED", "Base", "Measured", "can", "expected_seconds", "measure_baseline", "model_kind"]

Row = dict[str, Any]

PROMPTED = {name: ("classification", "causal") for name in ("zero_shot", "few_shot")}
TIMED_ROWS = 200


@dataclass(frozen=True)
class Base:
    """The base model that a prompted baseline asks.

    load            `load(auto)` gives (model, tokenizer), auto as `tunewise.backbone.load` takes it
    config          its configuration
    batch_size      rows per forward pass; None goes by task and device
    max_new_tokens  of a generated answer
    """

    load: Callable[[str], tuple[Any, Any]]
    config: Any
    batch_size: int | None = None
    max_new_tokens: int = 256


@dataclass
class Measured:
    """What a baseline answered and what it cost.

    predictions  one per test row, as `task.metrics` takes them
    metrics      the task's own, on all test rows
    costs        {"seconds": of training, "trainable", "size_mb": of what is learnt, "inference_seconds": per
                 1,000 rows, without generated answers}
    answers      generated texts, where the task has a metric of generated text
    notes        sentences on how it was measured
    """

    predictions: list[Any]
    metrics: dict[str, float]
    costs: dict[str, float]
    answers: list[str] | None = None
    notes: list[str] = field(default_factory=list)


def measure_baseline(
    name: str,
    task: Task,
    train: Sequence[Row],
    test: Sequence[Row],
    base: Base | None = None,
    *,
    tick: Tick | None = None,
) -> Measured:
    """Predictions of the baseline on every test row, their metrics by the task, and costs.

    task  fitted on `train`; it is left as it is
    base  not needed for majority, mean and tfidf; the model is given back in the mode that it was in
    tick  called with the number of rows after each batch
    Raises `UserError` where `can` gives a reason, and for worked examples that do not fit into the model.
    """
    if name in FITTED:
        _refuse(name, can(name, None, None, task))
        return _measure_fitted(name, task, train, test)
    with _planned(name, task, train, test, base) as plan:
        start = time.perf_counter()
        predictions = plan.passes.run(tick)
        seconds = time.perf_counter() - start
        answers = None if plan.answers is None else plan.answers.run(tick)
    metrics = task.metrics(predictions, test)
    if answers is not None:
        from tunewise.task import CausalLM, generation_metrics

        assert isinstance(task, CausalLM)
        metrics |= generation_metrics(task, answers, test)
    costs = {"seconds": 0.0, "trainable": 0, "size_mb": 0.0, "inference_seconds": seconds * 1000 / len(test)}
    return Measured(predictions, metrics, costs, answers, plan.notes)


def expected_seconds(
    name: str, task: Task, train: Sequence[Row], test: Sequence[Row], base: Base | None = None
) -> float:
    """Seconds that `measure_baseline` will take without loading: a few rows are timed and extended to all."""
    if name in FITTED:
        _refuse(name, can(name, None, None, task))
        few = sample(task, train, TIMED_ROWS)
        _measure_fitted(name, task, few, few)  # pays for imports
        start = time.perf_counter()
        _measure_fitted(name, task, few, few)
        return (time.perf_counter() - start) * max(1.0, (len(train) + len(test)) / (2 * len(few)))
    with _planned(name, task, train, test, base) as plan:
        answers = 0.0 if plan.answers is None else plan.answers.seconds()
        return plan.ready + plan.passes.seconds() + answers


def can(name: str, config: Any, tokenizer: Any, task: Task) -> str | None:
    """Why this baseline cannot be measured, in words; None if it can. config, tokenizer: of the base model.

    Raises `UserError` for a name that is no baseline.
    """
    known = {name: tasks for name, (tasks, _) in FITTED.items()} | PROMPTED
    if name not in known:
        raise UserError(f'There is no baseline "{name}"{did_you_mean(name, known)}')
    if task.name not in known[name]:
        return f"{name} is a baseline of the tasks {' and '.join(known[name])}, not of {task.name}"
    if name in FITTED:
        return None
    from tunewise.study.baselines.label_names import why_no_names

    if config is None:
        return "the base model has no configuration that says what it is"
    if not hasattr(tokenizer, "get_vocab"):
        return "the base model has no tokenizer for text"
    kind = model_kind(config)
    shown = " ".join(getattr(config, "architectures", None) or [type(config).__name__])
    if kind is None:
        return f"the base model ({shown}) is an encoder-decoder, and only encoders and decoders are prompted"
    if kind != "causal_lm" and (name == "few_shot" or task.name == "causal"):
        return f"the base model ({shown}) is no decoder with a language-model head"
    if task.name == "causal":
        bare = name == "few_shot" and task.columns.label is None and task.columns.text != ("messages",)
        return "rows without prompt and answer cannot be shown as worked examples" if bare else None
    return why_no_names(task, tokenizer, worked=name == "few_shot", masked=kind == "masked_lm")


def model_kind(config: Any) -> str | None:
    """ "causal_lm", "masked_lm", or "base" without a language-model head; None for encoder-decoders.

    By what the checkpoint was saved as, else by what its configuration is commonly used for.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    if getattr(config, "is_encoder_decoder", False):
        return None
    names = " ".join(getattr(config, "architectures", None) or ())
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if names:
        if "ForMaskedLM" in names:
            return "masked_lm"
        head = any(end in names for end in ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))
        return "causal_lm" if causal and head else "base"
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        return "masked_lm"
    return "causal_lm" if causal else "base"


@dataclass
class _Plan:
    """Forward passes that give the predictions, and those that write answers; `ready`: seconds until here."""

    passes: Passes
    answers: Passes | None
    notes: list[str]
    ready: float = 0.0


def _refuse(name: str, reason: str | None) -> None:
    if reason is not None:
        raise UserError(f"The baseline {name} cannot be measured: {reason}.")


@contextmanager
def _planned(
    name: str, task: Task, train: Sequence[Row], test: Sequence[Row], base: Base | None
) -> Iterator[_Plan]:
    """A prompted baseline, ready to run; inside, the model is in evaluation mode and keeps no gradients."""
    import torch

    from tunewise.diagnose.inference import evaluating
    from tunewise.study.baselines.label_names import encoder_passes
    from tunewise.task import CausalLM

    if base is None:
        can(name, None, None, task)  # an unknown name is a worse mistake
        _refuse(name, "the base model is not given")
    assert base is not None
    kind = model_kind(base.config)
    model, tokenizer = base.load(kind or "base")
    _refuse(name, can(name, base.config, tokenizer, task))
    if kind != "base" and getattr(model, "get_output_embeddings", lambda: None)() is None:
        _refuse(name, f"{type(model).__name__} was loaded without its language-model head")
    own, start = copy.copy(task), time.perf_counter()
    own.notes = []
    own.bind(base.config)
    shots = train if name == "few_shot" else ()
    with evaluating(model), torch.no_grad():
        if isinstance(own, CausalLM):
            plan = _language(own, model, tokenizer, shots, test, base)
        elif kind == "causal_lm":
            plan = _labels(own, model, tokenizer, shots, test, base)
        else:
            size = base.batch_size or 32
            passes, how = encoder_passes(own, model, tokenizer, test, kind == "masked_lm", size)
            plan = _Plan(passes, None, [how])
        plan.notes += dict.fromkeys(own.notes)
        plan.ready = time.perf_counter() - start
        yield plan


def _told(count: int) -> str:
    return f" after {count} worked training example{'s' if count > 1 else ''}" if count else ""


def _labels(
    task: Any, model: nn.Module, tokenizer: Any, shots: Sequence[Row], test: Sequence[Row], base: Base
) -> _Plan:
    from tunewise.study.baselines.shots import label_passes

    passes, count = label_passes(task, model, tokenizer, shots, test, base.batch_size or 16)
    how = f"Prompt: the likeliest label name{_told(count)}, calibrated by prompts without content."
    return _Plan(passes, None, [how])


def _language(
    task: Any, model: nn.Module, tokenizer: Any, shots: Sequence[Row], test: Sequence[Row], base: Base
) -> _Plan:
    from tunewise.prepare import default_sizes
    from tunewise.study.baselines.passes import Passes
    from tunewise.study.baselines.shots import loss_passes, shown
    from tunewise.task import generate

    task.default_head().setup(task, tokenizer, model)
    size = base.batch_size or default_sizes("causal", next(model.parameters()).device.type)["eval_batch_size"]
    asked, rows, count, own = task, list(test), 0, None
    if shots:
        own = task.encode(test, tokenizer)
        asked, rows, count = shown(task, tokenizer, shots, test, own)
    passes = loss_passes(asked, model, tokenizer, rows, size, own)
    notes = [f"The base model as it is{_told(count)}."]
    if asked is not task:
        notes += asked.notes
    if task.generation_metric is None:
        return _Plan(passes, None, notes)
    writer = copy.copy(asked)
    writer.notes = []
    lengths = [e["length"] + base.max_new_tokens for e in writer.encode(rows, tokenizer, labelled=False)]

    def answer(numbers: Sequence[int]) -> list[str]:
        chosen, most = [rows[i] for i in numbers], base.max_new_tokens
        return generate(model, tokenizer, chosen, writer, max_new_tokens=most, batch_size=len(chosen))

    return _Plan(passes, Passes(lengths, base.batch_size or 8, answer), notes)


def _measure_fitted(name: str, task: Any, train: Sequence[Row], test: Sequence[Row]) -> Measured:
    start = time.perf_counter()
    predict, trainable, size = FITTED[name][1](task, train)
    fitted = time.perf_counter()
    predictions = predict(test)
    inference = (time.perf_counter() - fitted) * 1000 / len(test)
    costs = {
        "seconds": fitted - start,
        "trainable": trainable,
        "size_mb": size / 2**20,
        "inference_seconds": inference,
    }
    return Measured(predictions, task.metrics(predictions, test), costs)
