"""A run is one recipe at work: what parts may ask for (tensors, batches, stores, references, signals, child
runs).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tunewise.sites import Signals

from .checkpoint import get_rng, load_tree, save_tree, set_rng
from .delta import device_of
from .errors import UserError, did_you_mean
from .lifecycle import Lifecycle
from .part import SLOTS, Part, nested
from .recipe import Recipe
from .reference import Reference
from .stores import Store
from .streams import Example, Stream, Streams, seed_of
from .tensors import Tensors

if TYPE_CHECKING:
    from .handle import Handle

__all__ = ["Run"]


class Run:
    """Everything a part sees. `state_dict()` is all that a killed run needs to go on bit-equal.

    data        stream name -> encoded examples (never "test")
    task        turns examples into batches and outputs into losses; None in someone's own loop
    directory   where child runs and checkpoints are kept; None keeps them in memory
    settings    the loop's options (learning rate, batch size, steps, ...)
    """

    def __init__(
        self,
        handle: Handle,
        *,
        data: Mapping[str, Sequence[Example]] | None = None,
        task: Any = None,
        seed: int = 0,
        directory: Path | None = None,
        settings: Any = None,
    ) -> None:
        self.handle, self.recipe, self.model = handle, handle.recipe, handle.model
        self.task, self.seed, self.directory, self.settings = task, seed, directory, settings
        self.step, self.total_steps, self.epoch = 0, 0, 0
        self.tensors = Tensors(handle)
        self.streams = Streams(data or {}, seed, by_length=getattr(settings, "by_length", True))
        self.signals = Signals()
        self.lifecycle = Lifecycle(handle.recipe, self)
        self.tokenizer: Any = None
        self.metrics: dict[str, float] = {}
        self.listen: Callable[[dict[str, Any]], None] = lambda row: None
        self.sample_losses: dict[str, float] = {}
        self.loss_scale = 1.0
        self.extra: dict[str, Any] = {}
        self.reads: Any = None
        self._stores: dict[str, Store] = {}
        self._references: dict[str, Reference] = {}
        self._generators: dict[str, torch.Generator] = {}
        handle.run = self
        for _, part in handle.recipe.parts():
            for name in part.streams:
                if data is not None and name not in data and name not in ("calibration", "meta", "replay"):
                    raise UserError(
                        f"{type(part).__name__} needs rows for the stream {name}, and this run has none."
                    )

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return device_of(self.model)

    def batches(self, name: str, size: int) -> Stream:
        """Endless batches of encoded examples of a stream, with an order and a position of its own."""
        return self.streams.open(name, size)

    def collate(self, examples: list[Example]) -> Any:
        """The examples as one batch on the model's device; sample ids survive in `batch.ids`."""
        return self.task.collate(examples, self.tokenizer).to(self.device)

    def store(self, name: str, capacity: int = 10_000) -> Store:
        """The store of this name, made on first use."""
        if name not in self._stores:
            self._stores[name] = Store(name, capacity)
        return self._stores[name]

    def rng(self, name: str) -> torch.Generator:
        """A random generator of one's own, seeded by (seed, name) and checkpointed."""
        if name not in self._generators:
            self._generators[name] = torch.Generator().manual_seed(seed_of(self.seed, "rng", name))
        return self._generators[name]

    def reference(self, which: str, decay: float = 0.999) -> Reference:
        """The model as it was: "start", "previous" (last boundary), "ema", or the path of a saved adaptation."""
        if which not in self._references:
            made = Reference(self.handle, which, decay)
            if which == "start" and self.step and made.kept:
                raise UserError(
                    f"At step {self.step} the start of {next(iter(made.kept))} is gone: ask for "
                    'run.reference("start") in prepare, before the first step.'
                )
            self._references[which] = made
        return self._references[which]

    def log(self, **values: Any) -> None:
        """One row of metrics.jsonl."""
        self.listen({"step": self.step, **values})

    def outputs(self, batch: Any) -> Any:
        """The model's outputs for a batch; every pass of a run over rows goes through here."""
        asks = {k: v for part in self.recipe["head"] for k, v in getattr(part, "asks", {}).items()}
        self.reads = batch  # for deltas that must know the rows they see
        try:
            return self.model(**batch.inputs, **asks)
        finally:
            self.reads = None

    def forward(self, batch: Any) -> tuple[Tensor, Any]:
        """(logits read by the head, the model's outputs)."""
        outputs = self.outputs(batch)
        return self.read(batch, outputs), outputs

    def read(self, batch: Any, outputs: Any) -> Tensor:
        """The logits that the head reads from the model's outputs."""
        heads = [(t.part, t) for key, _, t in self.handle.sites if t.part.slot == "head"]
        if heads:
            part, t = heads[0]
            return part.logits(t.cast(torch.float32), outputs, batch)  # type: ignore[attr-defined,no-any-return]
        return outputs.logits  # type: ignore[no-any-return]

    def loss(self, batch: Any, units: float) -> Tensor:
        """Sum of all objectives for one micro-batch, the task's normalised by the units of the whole step."""
        parts = [p for p in self.recipe["objective"] if float(getattr(p, "weight", 1.0)) != 0.0]
        if not parts:
            raise UserError("Every objective has weight 0: there is nothing to minimise.")
        direct = getattr(parts[0], "direct", None) if len(parts) == 1 else None
        total: Tensor | None = None if direct is None else direct(self, batch, units)
        if total is not None:
            return total * float(getattr(parts[0], "weight", 1.0))
        logits, outputs = self.forward(batch)
        for part in parts:  # a weight of 0 is bit-identical to a run without this loss
            weight = float(getattr(part, "weight", 1.0))
            term: Tensor = part.loss(self, batch, logits, outputs, units)  # type: ignore[attr-defined]
            term = term if weight == 1.0 else term * weight
            total = term if total is None else total + term
        assert total is not None
        return total

    def fire(self, event: str, *args: Any) -> Any:
        """Calls the parts; only the loop and the handle do."""
        if event == "before_step":
            self.tensors.in_step, self.sample_losses = True, {}
        if event == "gradients" and self.loss_scale != 1.0:
            torch._foreach_div_(
                [i.tensor.grad for _, i in self.tensors.active() if i.tensor.grad is not None],
                self.loss_scale,
            )
        result = self.lifecycle.fire(event, *args)
        if event == "after_step":
            self.tensors.settle()
            for reference in self._references.values():
                reference.after_step()
        if event == "boundary":
            for reference in self._references.values():
                reference.boundary()
        return result

    def child(
        self,
        name: str,
        recipe: Recipe | None = None,
        *,
        data: dict[str, Sequence[Example]] | None = None,
        start: dict[str, Any] | None = None,
        settings: Any = None,
    ) -> dict[str, Any]:
        """Executes another run on the same backbone and gives its artefacts: adaptation, moments, stores,
        part states.

        Only these cross over; `start` takes such artefacts (any subset). A finished child is not run again on
        resume.
        """
        place = self.directory / "children" / name if self.directory else None
        if place is not None and (place / "artefacts").is_dir():
            return load_tree(place / "artefacts")
        from .handle import Handle

        with self._aside():
            wanted = (recipe or self.recipe).fresh()
            inner = Handle(self.model, wanted, f"child_{name}", self.handle.dtype, self.handle.plain, True)
            torch.manual_seed(seed_of(self.seed, "child", name))
            inner.build()
            child = Run(
                inner,
                data=data or dict(self.streams.data),
                task=self.task,
                seed=seed_of(self.seed, name),
                directory=place,
                settings=settings or self.settings,
            )
            child.tokenizer, child.listen = self.tokenizer, lambda row: self.listen({"child": name, **row})
            try:
                child._begin(start or {})
                child.recipe.single("loop").run(child)  # type: ignore[union-attr]
                artefacts = child.artefacts()
            finally:
                inner.detach()
        if place is not None:
            save_tree(place / "artefacts", artefacts)
        return artefacts

    @contextmanager
    def _aside(self) -> Iterator[None]:
        was, state = self.handle.active, get_rng()
        training: dict[nn.Parameter, bool] = {p: p.requires_grad for p in self.model.parameters()}
        self.handle.deactivate()
        try:
            yield
        finally:
            set_rng(state)
            if was:
                self.handle.activate()
            for p, flag in training.items():
                p.requires_grad_(flag)

    def _begin(self, start: dict[str, Any]) -> None:
        for name in start.keys() - {"adaptation", "moments", "stores", "parts"}:
            raise UserError(f'Runs share no artefact "{name}": only adaptation, moments, stores and parts.')
        if "adaptation" in start:
            self.handle.load_state(start["adaptation"])
        if "moments" in start:
            self.extra["moments"] = start["moments"]
        for name, state in start.get("stores", {}).items():
            self.store(name).load_state_dict(copy.deepcopy(state))
        self._load_part_states(start.get("parts", {}))

    def artefacts(self) -> dict[str, Any]:
        """What may cross to another run, by name."""
        optimizer = self.recipe.single("optimizer")
        moments = (
            optimizer.state_dict(self) if optimizer is not None and hasattr(optimizer, "state_dict") else {}
        )
        return {
            "adaptation": {k: v.clone() for k, v in self.handle.state().items()},
            "moments": copy.deepcopy(moments),
            "stores": copy.deepcopy({n: s.state_dict() for n, s in self._stores.items()}),
            "parts": copy.deepcopy(self._part_states()),
        }

    def _part_states(self) -> dict[str, list[dict[str, Any]]]:
        return {key: [one.state for one in nested(part)] for key, part in self._named_parts().items()}

    def _load_part_states(self, states: dict[str, list[dict[str, Any]]]) -> None:
        parts = self._named_parts()
        for key, saved in states.items():
            if key not in parts and any(saved):
                raise UserError(
                    f"The recipe has no part {key}, whose state was to be taken over{did_you_mean(key, parts)}"
                )
            for one, state in zip(nested(parts[key]) if key in parts else [], saved, strict=False):
                one.__dict__["_state"] = copy.deepcopy(state)

    def _named_parts(self) -> dict[str, Part]:
        return {f"{s}.{i}.{type(p).__name__}": p for s in SLOTS for i, p in enumerate(self.recipe[s])}

    def state_dict(self) -> dict[str, Any]:
        """Everything that learns or moves."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "total_steps": self.total_steps,
            "tensors": self.handle.state(),
            "frozen": self.tensors.frozen,
            "dropped": self.tensors.dropped,
            "streams": self.streams.state_dict(),
            "parts": self._part_states(),
            "stores": {n: s.state_dict() for n, s in self._stores.items()},
            "references": {n: r.state_dict() for n, r in self._references.items()},
            "generators": {n: g.get_state() for n, g in self._generators.items()},
            "lifecycle": self.lifecycle.state_dict(),
            "metrics": self.metrics,
            "extra": self.extra,
            "rng": get_rng(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken; the optimizer's own state is loaded by its slot."""
        self.step, self.epoch, self.total_steps = state["step"], state["epoch"], state["total_steps"]
        self.handle.load_state(state["tensors"])
        for name in state["frozen"] | state["dropped"]:
            self.tensors.info(name).tensor.requires_grad_(False)
        self.tensors.frozen, self.tensors.dropped = state["frozen"], state["dropped"]
        self.streams.load_state_dict(state["streams"])
        self._load_part_states(state["parts"])
        for name, saved in state["stores"].items():
            self.store(name, saved["capacity"]).load_state_dict(saved)
        for name, saved in state["references"].items():
            self._references[name] = Reference(self.handle, name, saved["decay"])
            self._references[name].load_state_dict(saved)
        for name, saved in state["generators"].items():
            self.rng(name).set_state(saved)
        self.lifecycle.load_state_dict(state["lifecycle"])
        self.metrics, self.extra = state["metrics"], state["extra"]
        set_rng(state["rng"])
