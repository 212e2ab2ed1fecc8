"""The skeleton of a model: its blocks with layer numbers and stacks, and the sub-layers in each block."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from .roles import is_attention, kind_of

if TYPE_CHECKING:
    from .site import Site

__all__ = ["Block", "Skeleton", "Sublayer", "find_skeleton", "parents", "sublayers"]

_STACK = (
    ("text", re.compile(r"text|language_model")),
    ("vision", re.compile(r"vision|visual|image")),
    ("audio", re.compile(r"audio|speech")),
    ("encoder", re.compile(r"^encoder$")),
    ("decoder", re.compile(r"^decoder$")),
)
_RESIDUAL_NORM = re.compile(r"^layer_?norm$", re.IGNORECASE)


@dataclass(frozen=True)
class Block:
    """One repeated layer; `layer` counts within its `stack`."""

    name: str
    layer: int
    stack: str | None


@dataclass(frozen=True)
class Skeleton:
    """Blocks by name, and whether the model has several stacks."""

    blocks: dict[str, Block]
    several: bool

    def block_of(self, name: str) -> Block | None:
        """The block that holds the module `name`."""
        return next((self.blocks[p] for p in parents(name) if p in self.blocks), None)

    def stack_of(self, name: str) -> str | None:
        """The stack that `name` tells, in a model with several."""
        return _label(name) if self.several else None


class Sublayer(NamedTuple):
    """An attention or MLP: the module that ends it, and the modules where it is entered and left."""

    kind: str
    name: str
    entry: str
    exit: str


def parents(name: str) -> Iterator[str]:
    """Names of the modules around `name`, innermost first, ending with the model itself ("")."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def find_skeleton(modules: dict[str, nn.Module]) -> Skeleton:
    """Blocks = children of the innermost lists whose every child holds a token mixer.

    A T5 block's own list of sub-layers is none: its feed-forward has no mixer.  Where no list qualifies, the
    outermost lists of at least two modules of one class are taken (a plain residual network).
    """
    lists = {n: m for n, m in modules.items() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m)}
    mixing: dict[str, set[str]] = {name: set() for name in lists}
    for name, module in modules.items():
        if not name or kind_of(module) or not is_attention(name.rpartition(".")[2], module):
            continue
        below = name
        for parent in parents(name):
            if parent in mixing and below != name:
                mixing[parent].add(below)
            below = parent
    found = [name for name in lists if len(mixing[name]) == len(list(lists[name].children()))]
    found = [name for name in found if not any(o != name and _inside(o, name) for o in found)]
    if not found:
        alike = [name for name, module in lists.items() if _repeats(module)]
        found = [name for name in alike if not any(o != name and _inside(name, o) for o in alike)]
    return _number({name: list(lists[name]._modules) for name in found})


def _inside(name: str, owner: str) -> bool:
    return not owner or name == owner or name.startswith(owner + ".")


def _repeats(module: nn.Module) -> bool:
    children = list(module.children())
    weighed = any(kind_of(m) in ("linear", "conv") for c in children for m in c.modules() if m is not c)
    return len(children) > 1 and len({type(c) for c in children}) == 1 and weighed


def _number(lists: dict[str, list[str]]) -> Skeleton:
    several = len({_label(name) for name in lists}) > 1
    blocks: dict[str, Block] = {}
    count: Counter[str | None] = Counter()
    for name, children in lists.items():
        stack = _label(name) if several else None
        for child in children:
            full = f"{name}.{child}" if name else child
            blocks[full] = Block(full, count[stack], stack)
            count[stack] += 1
    return Skeleton(blocks, several)


def _label(name: str) -> str | None:
    parts = name.split(".")
    return next((label for label, pattern in _STACK for part in parts if pattern.search(part)), None)


def sublayers(block: str, leaves: list[Site]) -> list[Sublayer]:
    """Attention and MLP modules of one block, from the roles of its leaves."""
    found: dict[str, Sublayer] = {}
    for leaf in leaves:
        if any(sub.kind == leaf.component and _inside(leaf.name, sub.name) for sub in found.values()):
            continue
        if leaf.component == "attention" and leaf.role in ("query", "qkv", "output"):
            name = (
                _smallest(leaf.name, block, leaves, ({"query", "qkv"}, {"output"}))
                or leaf.name.rpartition(".")[0]
            )
            if name != block:
                found[name] = Sublayer("attention", name, name, _exit(name, leaves, "output"))
        elif leaf.component == "mlp" and leaf.role == "down":
            mlp = _mlp(leaf, block, leaves)
            found[mlp.name] = mlp
    return [
        s for s in found.values() if not any(o is not s and _inside(s.name, o.name) for o in found.values())
    ]


def _mlp(leaf: Site, block: str, leaves: list[Site]) -> Sublayer:
    name = _smallest(leaf.name, block, leaves, ({"up", "gate", "gate_up"}, {"down"}))
    mlps = [other for other in leaves if other.component == "mlp"]
    if name is None:
        up = next((other.name for other in mlps if other.role in ("up", "gate_up", "gate")), leaf.name)
        last = ".".join(leaf.name.split(".")[: len(block.split(".")) + 1])
        return Sublayer("mlp", last, up, leaf.name)
    for parent in parents(name):
        held = [other for other in leaves if _inside(other.name, parent)]
        if parent == block or any(other.component == "attention" for other in held):
            break
        more = sum(other.component == "mlp" for other in held) > sum(
            _inside(other.name, name) for other in mlps
        )
        if more or "expert" in name.rpartition(".")[2]:
            name = parent
    return Sublayer("mlp", name, name, _exit(name, leaves, "down"))


def _smallest(name: str, block: str, leaves: list[Site], groups: tuple[set[str], set[str]]) -> str | None:
    """The innermost module around `name` and below the block that holds a leaf of each group of roles."""
    for parent in parents(name):
        if parent == block:
            return None
        roles = {leaf.role for leaf in leaves if _inside(leaf.name, parent)}
        if all(group & roles for group in groups):
            return parent
    return None


def _exit(name: str, leaves: list[Site], last: str) -> str:
    """The module itself, or its last linear where it adds the residual and normalises (BERT, XLNet)."""
    held = [leaf for leaf in leaves if _inside(leaf.name, name)]
    if not any(leaf.kind == "norm" and _RESIDUAL_NORM.match(leaf.name.rpartition(".")[2]) for leaf in held):
        return name
    return next((leaf.name for leaf in reversed(held) if leaf.role == last and leaf.kind == "linear"), name)
