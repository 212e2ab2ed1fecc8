"""LoRA and DoRA as PEFT keeps them; also plain LoRA from given factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from tunewise.core.delta import Delta
from tunewise.core.errors import UserError
from tunewise.delta.dora import DoRA
from tunewise.delta.lora import LoRA
from tunewise.sites import Site

from .peft_files import PREFIX
from .peft_form import Arguments, Entry, Form, common, patterns, rank_and_alpha
from .peft_trained import Adapter, write_adapter

__all__ = ["Factor", "LoraForm", "write_lora"]

_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_LINEAR = {"lora_A.weight": "A", "lora_B.weight": "B"}
_EMBEDDING = {"lora_embedding_A": "A", "lora_embedding_B": "B"}
# PEFT itself writes lora_magnitude_vector, a name that transformers' load_adapter does not find; both find this.
_MAGNITUDE = {"lora_magnitude_vector.weight": "m"}


@dataclass(frozen=True)
class Factor:
    """s B A at one module: A `[rank, in]`, B `[out, rank]`, s = alpha / rank (or / sqrt(rank))."""

    a: Tensor
    b: Tensor
    alpha: float
    embedding: bool = False
    transposed: bool = False

    def keys(self, name: str) -> dict[str, Tensor]:
        """The two tensors under PEFT's names."""
        names = _EMBEDDING if self.embedding else _LINEAR
        return {f"{PREFIX}{name}.{key}": self.a if ours == "A" else self.b for key, ours in names.items()}


class LoraForm(Form):
    """`LORA`: W' = W + s B A, and with `use_dora` its direction alone, a magnitude beside it."""

    kind = "LORA"
    title = "LoRA"
    deltas: ClassVar[tuple[type[Delta], ...]] = (LoRA, DoRA)
    names: ClassVar[dict[str, str]] = _LINEAR | _EMBEDDING | _MAGNITUDE
    aliases: ClassVar[dict[str, str]] = {"lora_magnitude_vector": "lora_magnitude_vector.weight"}
    reads = frozenset(
        {"alpha_pattern", "ensure_weight_tying", "eva_config", "init_lora_weights", "loftq_config"}
    )
    reads |= {"lora_alpha", "lora_dropout", "megatron_core", "qalora_group_size", "r", "rank_pattern"}
    reads |= {"runtime_config", "use_dora", "use_rslora"}
    only = "lora_only"
    kinds = ("linear", "embedding")
    conv1d = True

    def check(self, config: dict[str, Any], file: Path) -> None:
        start = config.get("init_lora_weights")
        if start not in _STARTS:
            raise UserError(
                f"{file} has init_lora_weights={start!r}, which changes the base weights as well: convert it "
                "with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...) first."
            )
        super().check(config, file)

    def arguments(self, site: Site, tensors: dict[str, Tensor], config: dict[str, Any]) -> Arguments:
        rank, alpha = rank_and_alpha(config, site.name, 8, "lora_alpha")
        scaling = "sqrt" if config.get("use_rslora") else "rank"
        options = {"rank": rank, "alpha": alpha, "scaling": scaling}
        options["dropout"] = float(config.get("lora_dropout") or 0.0)
        return (DoRA if config.get("use_dora") else LoRA), options

    def theirs(self, t: Any) -> dict[str, Tensor]:
        a, b = t.part.stacked(t) if isinstance(t.part, LoRA) else (t.A, t.B)
        names = _EMBEDDING if t.kind == "embedding" else _LINEAR
        found = {key: a if ours == "A" else b for key, ours in names.items()}
        return found | {key: t.m for key in _MAGNITUDE if "m" in t.meta}

    def options(self, entries: Sequence[Entry]) -> dict[str, Any]:
        dora = {isinstance(t.part, DoRA) for _, t in entries}
        if len(dora) > 1:
            raise UserError(
                "PEFT keeps DoRA at all modules or at none, not beside LoRA; export to lora instead."
            )
        alphas, ranks = {}, {}
        for site, t in entries:
            part, rank = t.part, len(next(iter(self.theirs(t).values())))
            unit = rank if part.scaling == "rank" else rank**0.5
            alphas[site.name] = part.alpha if rank == part.rank else part.s * unit
            ranks[site.name] = rank
        return {
            **patterns("r", "rank_pattern", ranks),
            **patterns("lora_alpha", "alpha_pattern", alphas),
            "lora_dropout": common(entries, "dropout", "LoRA"),
            "use_rslora": common(entries, "scaling", "LoRA") == "sqrt",
            "use_dora": dora.pop(),
            "fan_in_fan_out": any(site.transposed for site, _ in entries),
            "init_lora_weights": True,
        }


def write_lora(
    model: nn.Module,
    factors: dict[str, Factor],
    trained: dict[str, Tensor],
    directory: str | Path,
    base_name: str | None = None,
) -> Path:
    """A LoRA checkpoint of `factors` by module name and of the parameters `trained` by name."""
    if not factors:
        raise UserError("A PEFT checkpoint needs LoRA at one module at least; export to hf instead.")
    tensors = {k: v for name, factor in factors.items() for k, v in factor.keys(name).items()}
    options = {
        **patterns("r", "rank_pattern", {name: len(f.a) for name, f in factors.items()}),
        **patterns("lora_alpha", "alpha_pattern", {name: f.alpha for name, f in factors.items()}),
        "lora_dropout": 0.0,
        "use_rslora": False,
        "fan_in_fan_out": any(f.transposed for f in factors.values()),
        "init_lora_weights": True,
    }
    adapter = Adapter("LORA", "LoRA", list(factors), tensors, options, "lora_only")
    return write_adapter(model, adapter, trained, directory, base_name)
