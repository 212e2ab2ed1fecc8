"""`handle = attach(model, "lora(rank=8)")`: what a user holds; merge, save, restore, watch, detach."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tunewise.sites import Tied, put_weight, tie, untie

from .adaptation import Adaptation, handles
from .checkpoint import FORMAT, write_json
from .compat import check
from .delta import SiteDelta, forms
from .errors import UserError, did_you_mean
from .merge import materialize, merged_tensors, not_mergeable
from .method import read_recipe
from .part import describe_part
from .plans import rebuild
from .recipe import Recipe
from .trainer import trainer_callback

if TYPE_CHECKING:
    from .run import Run

__all__ = ["Handle", "attach", "read_adaptation", "restore"]


class Handle(Adaptation):
    """An adaptation on a model, in a user's hand. Also reachable as `tw.handles(model)[name]`, on copies too."""

    run: Run | None = None
    merge_errors: dict[str, float] = {}
    _tied: Tied = []

    @property
    def trainable(self) -> int:
        """Number of trainable scalars."""
        return sum(i.tensor.numel() for i in self.tensors().values())

    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, for an optimizer of one's own."""
        return [i.tensor for i in self.tensors().values()]

    def state(self) -> dict[str, Tensor]:
        """name -> tensor, trained and frozen ones, detached but not copied."""
        found = {n: i.tensor.detach() for n, i in self.tensors().items()}
        found |= {n: b.detach() for n, b in self.buffers().items()}
        commits = self.commits()
        return found | {f"commit.{n}": commits[n][0].detach() for n in self.moved}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Puts saved tensors in place, also where their sizes have changed since. Names must agree exactly."""
        commits = {n.removeprefix("commit."): v for n, v in state.items() if n.startswith("commit.")}
        state = {n: v for n, v in state.items() if not n.startswith("commit.")}
        mine = {n: v for n, v in self.state().items() if not n.startswith("commit.")}
        for name in mine:
            if name not in state:
                raise UserError(f"The saved adaptation lacks the tensor {name}.")
        for name in state:
            if name not in mine:
                raise UserError(
                    f"The saved adaptation has a tensor {name} that this one lacks{did_you_mean(name, mine)}"
                )
        buffers = self.buffers()
        infos = self.tensors()
        for name, info in infos.items():
            shape, axis = list(state[name].shape), info.axis
            if axis is not None and len(shape) == info.tensor.dim():
                shape[axis] = info.tensor.shape[axis]  # units may have come or gone
            if shape != list(info.tensor.shape):
                raise UserError(f"The saved {name} has another shape, {tuple(state[name].shape)}.")
        self._load_commits(commits)
        with torch.no_grad():
            for name, value in state.items():
                if name in buffers:
                    place: Any = self.locate(name)
                    place[0]._buffers[place[1]] = value.to(buffers[name].device, buffers[name].dtype).clone()
                elif infos[name].tensor.shape == value.shape:
                    infos[name].tensor.copy_(value)
                else:
                    old = infos[name].tensor
                    new = nn.Parameter(
                        value.to(old.device, old.dtype).clone(), requires_grad=old.requires_grad
                    )
                    self.put(name, new)

    @torch.no_grad()
    def _load_commits(self, values: dict[str, Tensor]) -> None:
        for name in values.keys() - self.moved.keys():
            weight = self.model.get_parameter(name)
            self.committed.setdefault(name, (weight, weight.detach().clone()))
            self.moved[name] = weight.detach().clone()
        for name, before in self.moved.items():
            self.commits()[name][0].copy_(values.get(name, before))

    def materialize(self, site: str | None = None) -> dict[str, Tensor]:
        """{site: W' - W}, `[out, in]`; raises `UserError` if the adaptation is not mergeable."""
        return materialize(self, site)

    @torch.no_grad()
    def merge(self, *, quantized: bool = False) -> nn.Module:
        """Writes W' into the base and takes the deltas out of the forward pass. Originals are kept for
        `unmerge`.

        Quantized layers are refused, as rounding W' to their codes may lose more than was learnt. With
        `quantized` they get it, each in its own scheme, and `merge_errors` says what that cost:
        {site: |rounded - W'| / |W' - W|}, and over all of them under "".
        """
        reason = not_mergeable(self)
        if reason:
            raise UserError(reason)
        if self.merged is not None:
            raise UserError(f'The adaptation "{self.name}" is merged already.')
        others = [h.name for h in handles(self.model).values() if h.active and h is not self]
        if others or self.share != 1.0:
            more = f'switch "{others[0]}" off' if others else "end the mix with activate()"
            raise UserError(f"Merge into the base alone: {more} first.")
        self._refuse_rows()
        shared = [s.module for _, s, _ in self.sites if s.tied or s.role == "head" or s.kind == "embedding"]
        self._tied = untie(self.model, shared)
        try:
            news, self.merge_errors = merged_tensors(self, quantized)
        except UserError:
            tie(self.model, self._tied)
            raise
        self.merged = {}
        names = {id(m): n for n, m in self.model.named_modules()}
        for module, parameter, new in news:
            key, target = f"{names[id(module)]}.{parameter}", module._parameters[parameter]
            assert target is not None
            if isinstance(new, nn.Parameter):  # codes: the whole object is exchanged
                self.merged[key] = put_weight(module, new)
            else:
                self.merged[key] = target.detach().clone()
                target.copy_(new)
        self.active = False  # existing parameters stay in place: they are the merged model's
        rebuild(self.model)
        return self.model

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts the kept originals back, bit-equal, and switches the adaptation on again."""
        if self.merged is None:
            raise UserError(f'The adaptation "{self.name}" is not merged.')
        for name, original in self.merged.items():
            if isinstance(original, nn.Parameter):
                put_weight(self.model.get_submodule(name.rpartition(".")[0]), original)
            else:
                self.model.get_parameter(name).copy_(original)
        tie(self.model, self._tied)
        self.merged, self.active, self.merge_errors = None, True, {}
        rebuild(self.model)

    def save(self, directory: str | Path, extra: dict[str, Any] | None = None) -> Path:
        """Writes `adaptation.safetensors` and `adaptation.json` (recipe, sizes, tags); never pickle."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        from .lifecycle import Lifecycle

        trained = any(i.tensor.grad is not None for i in self.tensors().values())
        lifecycle = self.run.lifecycle if self.run is not None else Lifecycle(self.recipe, None)
        if (self.run is not None or trained) and lifecycle.unfired():
            raise UserError(str(lifecycle.unfired()))
        state = {n: v.cpu().contiguous() for n, v in self.state().items()}
        state |= {f"commit.{n}": w.detach().cpu().contiguous() for n, (w, _) in self.commits().items()}
        part = folder / ".adaptation.safetensors.part"
        save_file(state, part, metadata={"format": "pt"})
        part.chmod(folder.stat().st_mode & 0o666)  # safetensors makes files that nobody else may read
        part.replace(folder / "adaptation.safetensors")
        described = {
            "format": FORMAT,
            "name": self.name,
            "recipe": self.recipe.describe(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "sites": {s.name: k for k, s, _ in self.sites},
            "tags": {n: i.tag for n, i in self.tensors().items()},
            **(extra or {}),
        }
        write_json(folder / "adaptation.json", described)
        return folder

    def load(self, directory: str | Path) -> None:
        """Takes the tensors of a saved adaptation of the same recipe, in place: the base, the optimizer's
        parameters and compiled code stay. Raises `UserError`, before anything is written, for another recipe.
        """
        described, state = read_adaptation(directory)
        recipe = Recipe.from_description(described["recipe"])
        mine, theirs = ([describe_part(p) for p in r["delta"] + r["head"]] for r in (self.recipe, recipe))
        if theirs != mine:
            raise UserError(
                f'{directory} holds {recipe.name or "a recipe"} with other settings than "{self.name}" '
                f"({self.recipe.name}): attach it beside this one with tw.restore(model, directory, name=...)."
            )
        if self.merged is not None:
            raise UserError(f'The adaptation "{self.name}" is merged into the model; unmerge it first.')
        self.load_state(state)

    def detach(self) -> None:
        """Takes everything away, bit-equal; a merged adaptation is unmerged first."""
        if self.merged is not None:
            self.unmerge()
        super().detach()

    def check_called(self) -> None:
        """Raises `UserError` for a site that owns a delta and was not called in the forward pass so far."""
        for _, site, t in self.sites:
            if t.calls == 0 and t.part.slot == "delta":
                raise UserError(
                    f"{site.name} owns a {type(t.part).__name__} and was not called in the first forward pass, "
                    f'so it would never learn; leave it out, for example sites="linear & ~{site.name}".'
                )

    def frozen_eval(self) -> None:
        """With a side network the backbone stays in evaluation mode: its dropout is off in training too."""
        if any("read" in forms(p) for _, p in self.deltas):
            for module in self.model.modules():
                if not isinstance(module, SiteDelta):
                    module.training = False

    def watch(self, optimizer: torch.optim.Optimizer) -> Run:
        """Fires the parts' events from the steps of one's own optimizer; gives the run that parts see."""
        from .run import Run

        run = self.run = self.run or Run(self)
        run.tensors.optimizer = optimizer
        run.fire("prepare")

        def before(*_: Any) -> None:
            if run.step == 0:
                self.check_called()
            run.fire("gradients")

        def after(*_: Any) -> None:
            run.step += 1
            run.fire("after_step")
            run.fire("before_step")

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)
        run.fire("before_step")
        return run

    def callback(self) -> Any:
        """A `transformers.TrainerCallback` that fires the parts' events inside Trainer."""
        return trainer_callback(self)


def attach(
    model: nn.Module,
    method: Any,
    *,
    name: str = "default",
    dtype: torch.dtype = torch.float32,
    plain: bool = False,
    undo: bool = True,
    seed: int | None = None,
) -> Handle:
    """W -> W' at the sites of `method` ("lora(rank=8)", a recipe, a part); the base is frozen and renamed
    nowhere.

    dtype  of the trainable tensors; `plain` uses eager equations instead of fused ones (second derivatives);
    undo   keeps copies of trained base weights, so that `detach` is bit-equal (costs their size once)
    Raises `UserError` for a wrapped, sharded or already adapted model and for recipes that cannot work.
    """
    recipe: Recipe = read_recipe(method).fresh()
    check(recipe)
    needs_plain = {"second_order", "per_sample", "internals"} & {
        n for _, p in recipe.parts() for n in p.needs
    }
    handle = Handle(model, recipe, name, dtype, plain or bool(needs_plain), undo)
    state = torch.get_rng_state() if seed is not None else None
    if seed is not None:
        torch.manual_seed(seed)
    handle.build()
    if state is not None:
        torch.set_rng_state(state)
    return handle


def restore(model: nn.Module, directory: str | Path, *, name: str | None = None) -> Handle:
    """Attaches a saved adaptation to a fresh base model: equal outputs to those before saving."""
    described, state = read_adaptation(directory)
    recipe = Recipe.from_description(described["recipe"])
    handle = Handle(model, recipe, name or described["name"], getattr(torch, described["dtype"]), False, True)
    commits = {n.removeprefix("commit."): v for n, v in state.items() if n.startswith("commit.")}
    handle.build(start=False)
    handle.load_state({n: v for n, v in state.items() if not n.startswith("commit.")})
    for weight_name, written in commits.items():
        weight = model.get_parameter(weight_name)
        handle.committed[weight_name] = (weight, weight.detach().clone())
        with torch.no_grad():
            weight.copy_(written)
    return handle


def read_adaptation(directory: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(description, tensors) of a saved adaptation."""
    folder = Path(directory)
    if (folder / "adaptation" / "adaptation.json").is_file():
        folder = folder / "adaptation"
    file = folder / "adaptation.json"
    if not file.is_file():
        pefts = (folder / "adapter_config.json").is_file()
        other = " It is a PEFT checkpoint: tw.read_peft attaches it." if pefts else ""
        raise UserError(f"{directory} holds no adaptation: {file.name} is missing.{other}")
    described = json.loads(file.read_text(encoding="utf-8"))
    if described.get("format") != FORMAT:
        raise UserError(f"{file} has format {described.get('format')}; this version reads {FORMAT}.")
    return described, load_file(folder / "adaptation.safetensors")
