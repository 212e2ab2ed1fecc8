"""Loads a pretrained model and its tokenizer by name: safetensors only, never code from a model folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunewise.core.errors import UserError, did_you_mean

from .source import Source, find_source

__all__ = ["AUTO_CLASSES", "backbone_config", "load", "renew"]

AUTO_CLASSES = {
    "base": "AutoModel",
    "sequence_classification": "AutoModelForSequenceClassification",
    "image_classification": "AutoModelForImageClassification",
    "masked_lm": "AutoModelForMaskedLM",
    "causal_lm": "AutoModelForCausalLM",
}
DTYPES = ("auto", "float32", "bfloat16", "float16")
Note = Callable[[str], None]


def load(
    name_or_path: str | Path,
    *,
    auto: str = "base",
    labels: Sequence[Any] | None = None,
    regression: bool = False,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    meta: bool = False,
    note: Note | None = None,
) -> tuple[nn.Module, Any]:
    """(model in eval mode, tokenizer): an existing path wins, then demo names (`demo:` forces), then hub ids.

    auto    what the model is loaded for: one of `AUTO_CLASSES`
    labels  class names in the order of the logits; kept in the model's configuration
    dtype   "auto" or None for that of the checkpoint (float16 becomes float32 on a CPU)
    meta    builds the model without weights on the meta device, for estimates
    note    gets a sentence about everything that was filled in: new weights, a replaced pad token, downloads
    A new classifier is initialised from torch's global generator. For image and sound models the second value
    is the processor, or None with a note where the installation cannot have it. Raises `UserError` for names
    that lead nowhere, folders that hold no model, checkpoints without safetensors or with missing weights,
    and models that need code of their own.
    """
    if auto not in AUTO_CLASSES:
        raise UserError(f'There is no kind of model "{auto}"{did_you_mean(auto, AUTO_CLASSES)}')
    say: Note = note or (lambda sentence: None)
    source = find_source(name_or_path, weights=not meta, note=note)
    with _quiet():
        config = _config(source)
        _put_labels(config, labels, regression)
        tokenizer = _tokenizer(source, config, say)
        kind = _dtype(dtype, config, device)
        model = _build(source, auto, config, kind) if meta else _pretrained(source, auto, config, kind, say)
        _put_padding(model, tokenizer, say)
    if device is not None and not meta:
        model = model.to(device)
    return model.eval(), tokenizer


def backbone_config(name_or_path: str | Path, *, note: Note | None = None) -> Any:
    """The model's configuration alone, for example for `head.auto_for(config)`; no weights are read."""
    source = find_source(name_or_path, weights=False, note=note)
    with _quiet():
        return _config(source)


def renew(model: nn.Module) -> None:
    """Draws the weights anew that the checkpoint did not bring, from torch's global generator as `load` does.

    With the generator in the same state the model is bit-equal to a freshly loaded one.
    """
    new: frozenset[str] = getattr(model, "_tunewise_new", frozenset())
    for name, module in model.named_modules():
        own = {f"{name}.{key}".lstrip("."): p for key, p in module.named_parameters(recurse=False)}
        if new & own.keys():
            for parameter in own.values():
                parameter._is_hf_initialized = False  # type: ignore[attr-defined]
            model._init_weights(module)  # type: ignore[operator]


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no reports of transformers; what matters of them is said as notes."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _plainly(source: Source, what: str) -> Iterator[None]:
    """The errors of transformers as one sentence that names the model."""
    from safetensors import SafetensorError

    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        text = " ".join(str(error).split())
        if "trust_remote_code" in text:
            reason = "it needs Python code of its own (trust_remote_code), which Tunewise never runs"
        elif "safetensors" in text and isinstance(error, OSError):
            reason = "it has no model.safetensors; other formats can hold code and are not read"
        elif "Unrecognized configuration class" in text:
            reason = "its architecture has no such model in transformers"
        else:
            reason = text[:300].rstrip(".") or type(error).__name__
        raise UserError(f'"{source.name}" cannot be loaded as {what}: {reason}.') from error


def _config(source: Source) -> Any:
    from transformers import AutoConfig

    options = {"trust_remote_code": False, "local_files_only": source.local}
    with _plainly(source, "a model configuration"):
        return AutoConfig.from_pretrained(source.place, **options)


def _put_labels(config: Any, labels: Sequence[Any] | None, regression: bool) -> None:
    if regression and labels:
        raise UserError("A regression model has no labels.")
    if regression:
        config.num_labels, config.problem_type = 1, "regression"
    elif labels:
        names = [str(label) for label in labels]
        if len(set(names)) != len(names):
            raise UserError(f"The labels {names} are not different from each other.")
        config.id2label, config.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}
        config.problem_type = "single_label_classification"


def _dtype(dtype: str | torch.dtype | None, config: Any, device: Any) -> torch.dtype | str:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in (None, *DTYPES):
        raise UserError(f'There is no dtype "{dtype}"{did_you_mean(str(dtype), DTYPES)}')
    if dtype in (None, "auto"):
        half = getattr(config, "dtype", None) in (torch.float16, "float16")
        return torch.float32 if half and torch.device(device or "cpu").type == "cpu" else "auto"
    found: torch.dtype = getattr(torch, str(dtype))
    return found


def _tokenizer(source: Source, config: Any, say: Note) -> Any:
    import transformers

    mapping: Any = transformers.MODEL_MAPPING
    main = getattr(mapping.get(type(config), None), "main_input_name", "input_ids")
    reader = {"pixel_values": "AutoImageProcessor", "input_ids": "AutoTokenizer"}.get(
        main, "AutoFeatureExtractor"
    )
    options = {"trust_remote_code": False, "local_files_only": source.local}
    if reader == "AutoTokenizer":
        with _plainly(source, "a tokenizer"):
            return transformers.AutoTokenizer.from_pretrained(source.place, **options)
    try:
        return getattr(transformers, reader).from_pretrained(source.place, **options)
    except (ImportError, OSError) as error:  # the model itself works on tensors without it
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        say(f'"{source.name}" comes without a processor of its inputs: {reason}.')
        return None


def _auto_class(auto: str) -> Any:
    import transformers

    return getattr(transformers, AUTO_CLASSES[auto])


def _build(source: Source, auto: str, config: Any, dtype: torch.dtype | str) -> nn.Module:
    chosen = getattr(config, "dtype", None) if dtype == "auto" else dtype
    with _plainly(source, f'"{auto}"'), torch.device("meta"):
        model: nn.Module = _auto_class(auto).from_config(config, dtype=chosen, trust_remote_code=False)
        return model


def _pretrained(source: Source, auto: str, config: Any, dtype: torch.dtype | str, say: Note) -> nn.Module:
    with _plainly(source, f'"{auto}"'):
        model, info = _auto_class(auto).from_pretrained(
            source.place,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=source.local,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    missing = sorted(info["missing_keys"])
    other = sorted({key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]})
    head = [key for key in [*missing, *other] if _is_head(key, model, auto)]
    lost = [key for key in [*missing, *other] if key not in head]
    if lost or (head and auto.endswith("_lm")):
        first, count = (lost or head)[0], len(lost or head)
        raise UserError(
            f'"{source.name}" is no {type(model).__name__}: {first} '
            f"{f'and {count - 1} more weights are' if count > 1 else 'is'} missing or of another size in its "
            "checkpoint."
        )
    model._tunewise_new = frozenset(head)
    if head:
        why = " (the checkpoint's were of another size)" if other else ""
        say(f"New, untrained weights: {', '.join(head)}{why}.")
    return model


def _is_head(key: str, model: nn.Module, auto: str) -> bool:
    """Weights that a checkpoint may lack: the classifier, and a pooler that masked pretraining never had."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return "pooler" in key.split(".") or (auto != "base" and not key.startswith(prefix))


def _put_padding(model: nn.Module, tokenizer: Any, say: Note) -> None:
    if not hasattr(tokenizer, "pad_token"):
        return
    if tokenizer.pad_token is None:
        substitute = tokenizer.eos_token or tokenizer.unk_token
        if substitute is None:
            raise UserError("The tokenizer has no pad token, and no end or unknown token to stand for it.")
        tokenizer.pad_token = substitute
        say(f'The tokenizer has no pad token: "{substitute}" is used; padding is masked, never learnt from.')
    config: Any = model.config
    for one in {id(c): c for c in (config, config.get_text_config())}.values():
        if getattr(one, "pad_token_id", None) is None:
            one.pad_token_id = tokenizer.pad_token_id
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None and generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id
