"""Every kind of PEFT's adapters that can be read and written, one small class each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from tunewise.core.delta import Delta
from tunewise.core.errors import UserError
from tunewise.core.handle import Handle
from tunewise.core.run import Run
from tunewise.delta.ia3 import InputScale
from tunewise.delta.miss import BlockAffine, MiSS
from tunewise.delta.oft import OFT, ConstrainedOFT
from tunewise.delta.scale import Scale
from tunewise.delta.spectral import FourierFT
from tunewise.delta.vera import VeRA
from tunewise.sites import Site

from .peft_files import PREFIX
from .peft_form import Arguments, Entry, Form, common
from .peft_lora import LoraForm
from .peft_lycoris import LohaForm, LokrForm
from .peft_sparse import ShiraForm

__all__ = ["FORMS", "form_of"]


class VeraForm(Form):
    """`VERA`: two vectors per module around one pair of random matrices."""

    kind, title = "VERA", "VeRA"
    deltas = (VeRA,)
    names: ClassVar[dict[str, str]] = {"vera_lambda_d": "d", "vera_lambda_b": "b"}
    roots: ClassVar[dict[str, str]] = {"base_model.vera_A": "A", "base_model.vera_B": "B"}
    reads = frozenset({"d_initial", "init_weights", "projection_prng_key", "r", "save_projection"})
    reads |= {"vera_dropout"}
    only = "vera_only"
    conv1d = True

    def arguments(self, site: Site, tensors: dict[str, Tensor], config: dict[str, Any]) -> Arguments:
        return VeRA, {
            "rank": config.get("r", 256),
            "d_initial": config.get("d_initial", 0.1),
            "dropout": config.get("vera_dropout", 0.0),
            "seed": config.get("projection_prng_key", 0),
        }

    def options(self, entries: Sequence[Entry]) -> dict[str, Any]:
        if len({id(t.part) for _, t in entries}) > 1:
            raise UserError(
                "PEFT keeps one pair of projections for all of VeRA, not one for each of several parts; "
                "export to lora instead."
            )
        part = entries[0][1].part
        return {
            "r": part.rank,
            "d_initial": part.d_initial,
            "vera_dropout": part.dropout,
            "projection_prng_key": part.seed,
            "save_projection": True,
            "fan_in_fan_out": any(site.transposed for site, _ in entries),
        }


class OftForm(Form):
    """`OFT`: rotations of the input in blocks."""

    kind, title = "OFT", "OFT"
    deltas = (OFT, ConstrainedOFT)
    names: ClassVar[dict[str, str]] = {"oft_R.weight": "Q"}
    reads = frozenset({"block_share", "coft", "eps", "init_weights", "num_cayley_neumann_terms", "r"})
    reads |= {"oft_block_size", "use_cayley_neumann"}
    only = "oft_only"

    def arguments(self, site: Site, tensors: dict[str, Tensor], config: dict[str, Any]) -> Arguments:
        pairs = tensors["oft_R.weight"].shape[-1]
        options = {
            "block_size": round((1 + (1 + 8 * pairs) ** 0.5) / 2),  # size (size - 1) / 2 = pairs
            "terms": config.get("num_cayley_neumann_terms", 5)
            if config.get("use_cayley_neumann", True)
            else 0,
            "block_share": bool(config.get("block_share")),
        }
        return (
            (ConstrainedOFT, options | {"eps": config.get("eps", 6e-5)})
            if config.get("coft")
            else (OFT, options)
        )

    def options(self, entries: Sequence[Entry]) -> dict[str, Any]:
        coft = {isinstance(t.part, ConstrainedOFT) for _, t in entries}
        if len(coft) > 1:
            raise UserError("PEFT keeps the constrained form at all modules of OFT or at none.")
        sizes = {t.part.block_size for _, t in entries}
        counts = {(site.in_features or 0) // t.part.block_size for site, t in entries}
        if len(sizes) > 1 and len(counts) > 1:
            raise UserError(f"PEFT keeps one block_size for all of OFT, not {sorted(sizes)}.")
        terms = common(entries, "terms", "OFT")
        one = len(sizes) == 1
        return {
            "r": 0 if one else counts.pop(),
            "oft_block_size": sizes.pop() if one else 0,
            "block_share": common(entries, "block_share", "OFT"),
            "use_cayley_neumann": terms > 0,
            **({"num_cayley_neumann_terms": terms} if terms else {}),
            "coft": (constrained := coft.pop()),
            **({"eps": common(entries, "eps", "OFT")} if constrained else {}),
        }

    def loaded(self, handle: Handle) -> None:
        for _, part in handle.deltas:
            if isinstance(
                part, ConstrainedOFT
            ):  # PEFT projects before every use, and saves what it last trained
                part.after_step(Run(handle))


class Ia3Form(Form):
    """`IA3`: factors of a layer's outputs, or of what it reads where it is a feedforward module."""

    kind, title = "IA3", "IA3"
    deltas = (Scale, InputScale)
    names: ClassVar[dict[str, str]] = {"ia3_l": "g"}
    reads = frozenset({"feedforward_modules", "init_ia3_weights"})
    conv1d = True

    def arguments(self, site: Site, tensors: dict[str, Tensor], config: dict[str, Any]) -> Arguments:
        return (InputScale if len(tensors["ia3_l"]) == 1 else Scale), {}

    def theirs(self, t: Any) -> dict[str, Tensor]:
        return {"ia3_l": (1 + t.g)[None] if isinstance(t.part, InputScale) else (1 + t.g)[:, None]}

    def put(self, t: Any, tensors: dict[str, Tensor]) -> None:
        t.g.copy_(tensors["ia3_l"].flatten() - 1)

    def write(self, entries: Sequence[Entry]) -> dict[str, Tensor]:
        whole = [(site, t) for site, t in entries if t.rows is None]
        found = super().write(whole)
        for site, t in entries:
            if t.rows is None:
                continue
            key, rows = f"{PREFIX}{site.name}.ia3_l", t.rows
            count = site.module.weight.shape[1 if site.transposed else 0]  # type: ignore[union-attr,index]
            full = found.setdefault(key, t.g.new_ones(count, 1))
            if len(full) != count:
                raise UserError(
                    f"PEFT keeps one IA3 per module, and {site.name} has two; export to lora instead."
                )
            full[rows, 0] *= 1 + t.g.detach()
        return found

    def options(self, entries: Sequence[Entry]) -> dict[str, Any]:
        inner = sorted({site.name for site, t in entries if isinstance(t.part, InputScale)})
        outer = {site.name for site, _ in entries} - set(inner)
        mixed = any(name.endswith(tuple(inner)) for name in outer)
        return {
            "feedforward_modules": "|".join(map(re.escape, inner)) if mixed else inner,
            "fan_in_fan_out": any(site.transposed for site, _ in entries),
            "init_ia3_weights": True,
        }


class FourierForm(Form):
    """`FOURIERFT`: coefficients of a spectrum at places that the seed tells."""

    kind, title = "FOURIERFT", "FourierFT"
    deltas = (FourierFT,)
    names: ClassVar[dict[str, str]] = {"fourierft_spectrum": "coefficients"}
    reads = frozenset({"init_weights", "n_frequency", "n_frequency_pattern", "random_loc_seed", "scaling"})
    only = "fourier_only"
    conv1d = True

    def arguments(self, site: Site, tensors: dict[str, Tensor], config: dict[str, Any]) -> Arguments:
        seed = config.get("random_loc_seed", 777)
        if seed is None:
            raise UserError(
                "The checkpoint has random_loc_seed=None: where its coefficients stand is not known."
            )
        count = len(tensors["fourierft_spectrum"])
        return FourierFT, {"frequencies": count, "scale": config.get("scaling", 150.0), "seed": seed}

    def options(self, entries: Sequence[Entry]) -> dict[str, Any]:
        counts = {site.name: len(t.coefficients) for site, t in entries}
        most = max(set(every := list(counts.values())), key=every.count)
        others = {name: count for name, count in counts.items() if count != most}
        for name, count in counts.items():  # PEFT looks a pattern up behind a dot, else a whole name
            found = next(
                (v for key, v in others.items() if re.match(rf".*\.{key}$", name)), others.get(name, most)
            )
            if found != count:
                raise UserError(
                    f"PEFT cannot tell {name} from a module whose name ends alike; export to lora."
                )
        return {
            "n_frequency": most,
            "n_frequency_pattern": others,
            "scaling": common(entries, "scale", "FourierFT"),
            "random_loc_seed": common(entries, "seed", "FourierFT"),
            "fan_in_fan_out": any(site.transposed for site, _ in entries),
        }


class MissForm(Form):
    """`MISS`: one matrix for all blocks of inputs, its small and its block affine form."""

    kind, title = "MISS", "MiSS"
    deltas = (MiSS, BlockAffine)
    names: ClassVar[dict[str, str]] = {"miss_block": "D"}
    reads = frozenset({"init_weights", "mini_r", "miss_dropout", "r"})
    only = "MiSS_only"

    def arguments(self, site: Site, tensors: dict[str, Tensor], config: dict[str, Any]) -> Arguments:
        rank, dropout = config.get("r", 64), float(config.get("miss_dropout") or 0.0)
        if config.get("init_weights") == "bat":
            if dropout:
                raise UserError('MiSS with init_weights="bat" has no dropout here: set miss_dropout to 0.')
            return BlockAffine, {"rank": rank}
        mini = config.get("mini_r", 1) if config.get("init_weights") == "mini" else None
        return MiSS, {"rank": rank, "mini": mini, "dropout": dropout}

    def options(self, entries: Sequence[Entry]) -> dict[str, Any]:
        classes = {type(t.part) for _, t in entries}
        if len(classes) > 1:
            raise UserError("PEFT keeps one variant of MiSS for all modules, not balance beside bat.")
        rank = common(entries, "rank", "MiSS")
        if classes == {BlockAffine}:
            return {"r": rank, "init_weights": "bat"}
        mini = common(entries, "mini", "MiSS")
        dropout = {"miss_dropout": common(entries, "dropout", "MiSS")}
        if mini is None:
            return {"r": rank, "init_weights": True, **dropout}
        return {"r": rank, "mini_r": mini, "init_weights": "mini", **dropout}


class NormForm(Form):
    """`LN_TUNING`: norms trained whole; their values go with the model's other trained parameters."""

    kind, title = "LN_TUNING", "LayerNorm tuning"


FORMS: dict[str, Form] = {
    form.kind: form
    for form in (
        LoraForm(),
        LohaForm(),
        LokrForm(),
        VeraForm(),
        OftForm(),
        Ia3Form(),
        FourierForm(),
        MissForm(),
        ShiraForm(),
        NormForm(),
    )
}


def form_of(part: Delta) -> Form | None:
    """The kind that holds this very class of delta."""
    return next((form for form in FORMS.values() if type(part) in form.deltas), None)
