"""One kind of PEFT's adapters: its names of tensors and options beside ours, read and written by the same code."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from tunewise.core.delta import Delta
from tunewise.core.errors import UserError
from tunewise.core.handle import Handle
from tunewise.sites import Site

from .peft_files import CONFIG, PREFIX, WEIGHTS, number, pattern_value

__all__ = ["Arguments", "Entry", "Form", "common", "groups", "patterns", "rank_and_alpha"]

Entry = tuple[Site, Any]
"""A site and the tensors of a delta there."""
Arguments = tuple[type[Delta], dict[str, Any]]
"""The class of a delta and its options, sites left out."""

# Where the checkpoint is from, and what the tensors themselves tell.
_FREE = {
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "revision",
    "target_modules",
    "task_type",
}


class Form:
    """What one `peft_type` holds.

    kind    PEFT's `peft_type`; `title` is its name in sentences
    deltas  the classes that it can hold
    names   PEFT's name below a module -> our name of the tensor; `aliases` are names that mean the same
    roots   PEFT's name in the whole file -> our name of a tensor shared by all sites
    reads   options that are read, or that act on the start and on training alone
    only    value of the option `bias` for adapted modules; None where the kind has no such option
    kinds   of sites; `conv1d`: weights may be stored `[in, out]`
    """

    kind: ClassVar[str]
    title: ClassVar[str]
    deltas: ClassVar[tuple[type[Delta], ...]] = ()
    names: ClassVar[dict[str, str]] = {}
    aliases: ClassVar[dict[str, str]] = {}
    roots: ClassVar[dict[str, str]] = {}
    reads: ClassVar[frozenset[str]] = frozenset()
    only: ClassVar[str | None] = None
    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    conv1d: ClassVar[bool] = False

    def check(self, config: dict[str, Any], file: Path) -> None:
        """Raises `UserError` for an option that has no equal here, by its name."""
        known = _FREE | self.reads
        for name, value in config.items():
            if name in known or value in (None, False) or value in ([], {}, ""):
                continue
            raise UserError(f"{file} uses {name}={value!r}, which Tunewise cannot read.")
        for option in ("rank_pattern", "alpha_pattern", "n_frequency_pattern"):
            for key in config.get(option) or ():
                try:
                    re.compile(key)
                except re.error as error:
                    raise UserError(
                        f"{file}: the pattern {key!r} is no regular expression: {error}."
                    ) from None

    def arguments(self, site: Site, tensors: dict[str, Tensor], config: dict[str, Any]) -> Arguments:
        """The delta that these tensors of one site make up."""
        raise NotImplementedError

    def options(self, entries: Sequence[Entry]) -> dict[str, Any]:
        """PEFT's options for these sites; raises `UserError` where it has one value for different ones of ours."""
        return {}

    def theirs(self, t: Any) -> dict[str, Tensor]:
        """Our tensors at a site under PEFT's names and in its shapes."""
        return {name: getattr(t, ours) for name, ours in self.names.items() if ours in t.meta}

    def put(self, t: Any, tensors: dict[str, Tensor]) -> None:
        """PEFT's tensors, of the right shapes, into ours."""
        for name, value in tensors.items():
            t.get_parameter(self.names[name]).copy_(value)

    def loaded(self, handle: Handle) -> None:
        """Once after reading."""

    def write(self, entries: Sequence[Entry]) -> dict[str, Tensor]:
        """The tensors of a checkpoint by full key; raises `UserError` for two deltas at one module."""
        found: dict[str, Tensor] = {}
        seen: set[str] = set()
        for site, t in entries:
            self._check_site(site, t)
            if site.name in seen:
                raise UserError(
                    f"PEFT keeps one {self.title} per module, and {site.name} has two; export to lora instead."
                )
            seen.add(site.name)
            found |= {f"{PREFIX}{site.name}.{name}": v.detach() for name, v in self.theirs(t).items()}
        for key, ours in self.roots.items():
            found[key] = getattr(entries[0][1].shared, ours)
        return found

    def _check_site(self, site: Site, t: Any) -> None:
        if t.rows is not None:
            raise UserError(
                f"PEFT cannot hold {self.title} on the rows {site.role} of the fused {site.name} alone; "
                "export to lora instead."
            )
        if site.kind not in self.kinds:
            raise UserError(
                f"PEFT checkpoints of {self.title} on {site.kind} are not written ({site.name}); export to hf."
            )
        if site.transposed and not self.conv1d:
            raise UserError(
                f"PEFT has no {self.title} for {site.name}, which stores its weight [in, out]; "
                "export to lora instead."
            )

    def find(self, short: str) -> tuple[str, str] | None:
        """(module, name of its tensor) of a key without PEFT's prefix; None for other tensors."""
        for name in (*self.names, *self.aliases):
            if short.endswith(f".{name}"):
                return short.removesuffix(f".{name}"), self.aliases.get(name, name)
        return None

    @torch.no_grad()
    def load(self, handle: Handle, tensors: dict[str, dict[str, Tensor]], roots: dict[str, Tensor]) -> None:
        """Every tensor into its place. Raises `UserError` for one that is missing, left over or misshapen."""
        t: Any
        for _, site, t in handle.sites:
            if type(t.part) not in self.deltas:
                continue
            given, wanted = tensors[site.name], self.theirs(t)
            for name in wanted:
                if name not in given:
                    raise UserError(f"{WEIGHTS} lacks {name.removesuffix('.weight')} of {site.name}.")
            for name, value in given.items():
                if name not in wanted:
                    raise UserError(
                        f"{WEIGHTS} holds {name} of {site.name}, which its options and this model do not need."
                    )
                if value.shape != wanted[name].shape:
                    raise UserError(
                        f"{WEIGHTS}: {name} of {site.name} has the shape {tuple(value.shape)}; its options and "
                        f"this model need {tuple(wanted[name].shape)}."
                    )
            self.put(t, given)
            for key, ours in self.roots.items():
                _compare(key, roots.get(key), getattr(t.shared, ours))
        self.loaded(handle)


def _compare(key: str, given: Tensor | None, drawn: Tensor) -> None:
    """Shared projections are drawn again and not kept, so a checkpoint must hold the same ones."""
    if given is not None and (given.shape != drawn.shape or not torch.equal(given.to(drawn), drawn)):
        raise UserError(
            f"{WEIGHTS}: {key} is not what its seed (projection_prng_key in {CONFIG}) draws; merge the adapter "
            "with PEFT's merge_and_unload and go on from that model."
        )


def common(entries: Sequence[Entry], option: str, title: str) -> Any:
    """The one value of an option of all parts. Raises `UserError` when there are several."""
    values = {getattr(t.part, option) for _, t in entries}
    if len(values) > 1:
        raise UserError(f"PEFT keeps one {option} for all of {title}, not {sorted(values, key=str)}.")
    return next(iter(values))


def patterns(option: str, pattern: str, values: Mapping[str, float]) -> dict[str, Any]:
    """The commonest value as `option`, the others by module as `pattern`."""
    shown = {name: number(value) for name, value in values.items()}
    most = max(set(every := list(shown.values())), key=every.count)
    return {option: most, pattern: {f"^{re.escape(n)}": v for n, v in shown.items() if v != most}}


def rank_and_alpha(config: dict[str, Any], name: str, rank: int, alpha: str) -> tuple[int, float]:
    """Rank and alpha of a module, patterns first."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    r = pattern_value(ranks, name, config.get("r", rank))
    value = pattern_value(alphas, name, config.get(alpha, 8))
    if not isinstance(value, int | float):
        raise UserError(f"{CONFIG}: {alpha} of {name} must be a number, not {value!r}.")
    return r, float(value)


def groups(found: Iterable[tuple[str, Arguments]]) -> list[Delta]:
    """One part for the modules of equal options."""
    made: dict[str, tuple[Any, dict[str, Any], list[str]]] = {}
    for name, (kind, options) in found:
        key = f"{kind.__name__} {options}"
        made.setdefault(key, (kind, options, []))[2].append(f"re:{re.escape(name)}")
    return [kind(**options, sites=sites) for kind, options, sites in made.values()]
