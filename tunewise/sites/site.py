"""Sites: the places of a model where something can be attached or selected, with role, layer and sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor, nn

from .blocks import Skeleton, find_skeleton, sublayers
from .roles import component_of, fused_rows, kind_of, role_of

__all__ = ["KINDS", "Site", "find_sites"]

KINDS = ("linear", "embedding", "norm", "conv", "experts", "attention", "mlp", "block")


@dataclass(frozen=True, eq=False, repr=False)
class Site:
    """One place of a model; equal to another one with the same name, kind, parameter and rows.

    name          the module's full name; for 3-D experts the parameter's full name
    transposed    the weight is kept [in, out] (Conv1D) or [experts, in, out]
    roles         of a fused linear: {role: output rows}; empty where the layout is not known
    rows          narrowed output rows of a fused linear (sorted), None for all; out_features counts them
    entry, exit   of attention and mlp: the module whose input is the sub-layer's input, and the one whose
                  output is the sub-layer's output before the residual is added.  In Llama both are the module
                  itself; BERT's `attention` adds residual and norm, so its exit is `attention.output.dense`.
                  Where no module holds the whole MLP (BERT, ALBERT, BART, Whisper), the mlp site is its last
                  part (`output`, `ffn_output`, `fc2`), entered through the up projection.
    tied          name of an earlier site that shares the weight (lm_head and the token embedding), or None
    """

    name: str
    kind: str
    role: str
    module: nn.Module
    layer: int | None = None
    component: str | None = None
    stack: str | None = None
    in_features: int | None = None
    out_features: int | None = None
    transposed: bool = False
    rows: Tensor | None = None
    roles: dict[str, Tensor] = field(default_factory=dict)
    parameter: str | None = None
    count: int = 1
    entry: nn.Module | None = None
    exit: nn.Module | None = None
    tied: str | None = None

    @property
    def weight(self) -> nn.Parameter | None:
        """The base parameter of the whole module (never narrowed); None for containers and packed weights."""
        if self.kind in ("attention", "mlp", "block"):
            return None
        return self.module._parameters.get(self.parameter or "weight")

    @property
    def _key(self) -> tuple[object, ...]:
        return self.name, self.kind, None if self.rows is None else tuple(self.rows.tolist())

    def __eq__(self, other: object) -> bool:
        return self._key == other._key if isinstance(other, Site) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        size = "" if self.in_features is None else f", {self.in_features}->{self.out_features}"
        part = "" if self.rows is None else " (rows)"
        return f"Site({self.name}{part}, {self.kind}, {self.role}{size})"


def find_sites(model: nn.Module) -> list[Site]:
    """All sites of `model` in model order, containers before what they hold.

    A module that is used in several places is one site (ALBERT's layers).  No sites are: attachments (`tw_*`)
    and what is below them, an embedding `shared` whose weight encoder and decoder look up themselves (T5),
    and a router that is a bare parameter (Mixtral).
    """
    modules = {
        name: module
        for name, module in model.named_modules()
        if not any(part.startswith("tw_") or part == "parametrizations" for part in name.split("."))
    }
    skeleton = find_skeleton(modules)
    leaves = _mark_tied([site for name in modules for site in _leaf_sites(name, modules, skeleton)])
    containers = _containers(modules, skeleton, leaves)
    by_name: dict[str, list[Site]] = {}
    for site in [*containers, *leaves]:
        owner = site.name.rpartition(".")[0] if site.kind == "experts" else site.name
        by_name.setdefault(owner, []).append(site)
    return [site for name in modules for site in by_name.get(name, ())]


def _leaf_sites(name: str, modules: dict[str, nn.Module], skeleton: Skeleton) -> list[Site]:
    module, block = modules[name], skeleton.block_of(name)
    path = (name[len(block.name) + 1 :] if block else name).split(".")
    stack = block.stack if block else skeleton.stack_of(name)
    make: Callable[..., Site] = partial(
        Site, module=module, layer=block.layer if block else None, stack=stack
    )
    kind = kind_of(module)
    if kind is None:
        return _expert_sites(name, module, path, make)
    parent = modules.get(name.rpartition(".")[0])
    role = role_of(kind, path, block is not None, bool(skeleton.blocks))
    if role == "qkv" and hasattr(parent, "q_attn"):
        role = "kv"
    where, (ins, outs, turned) = component_of(path, role), _sizes(kind, module)
    fused = fused_rows(role, path[-1], outs, parent) if kind == "linear" else {}
    sizes = {"in_features": ins, "out_features": outs, "transposed": turned}
    return [make(name, kind, role, component=where, roles=fused, **sizes)]


def _sizes(kind: str, module: nn.Module) -> tuple[int, int, bool]:
    names = {"embedding": ("num_embeddings", "embedding_dim"), "conv": ("in_channels", "out_channels")}
    first, second = names.get(kind, ("in_features", "out_features"))
    if kind != "norm" and hasattr(module, first):
        return int(getattr(module, first)), int(getattr(module, second)), False
    shape = module.get_parameter("weight").shape
    return shape[0], shape[-1], kind == "linear"


def _expert_sites(name: str, module: nn.Module, path: list[str], make: Callable[..., Site]) -> list[Site]:
    if not any("expert" in text.lower() for text in (*path, type(module).__name__)):
        return []
    tensors = {key: p for key, p in module._parameters.items() if p is not None and p.dim() == 3}
    both, down = tensors.get("gate_up_proj"), tensors.get("down_proj")
    turned = bool(getattr(module, "is_transposed", False))
    if (
        both is not None and down is not None
    ):  # [E, 2I, H] and [E, H, I], or transposed [E, H, 2I] and [E, I, H]
        turned = both.shape[1] == down.shape[2]
    sites = []
    for key, tensor in tensors.items():
        role = role_of("linear", [*path, key], True, True)
        outs, ins = reversed(tensor.shape[1:]) if turned else tensor.shape[1:]
        sizes = {"in_features": ins, "out_features": outs, "transposed": turned, "count": len(tensor)}
        fused = fused_rows(role, key, outs, module)
        sites.append(
            make(f"{name}.{key}", "experts", role, component="mlp", parameter=key, roles=fused, **sizes)
        )
    return sites


def _mark_tied(leaves: list[Site]) -> list[Site]:
    ids = {site: id(site.module if site.weight is None else site.weight) for site in leaves}
    looked_up = Counter(ids[site] for site in leaves if site.kind == "embedding")
    first: dict[int, str] = {}
    kept = []
    for site in leaves:
        if site.name.split(".")[-1] == "shared" and looked_up[ids[site]] > 1:
            continue
        owner = first.setdefault(ids[site], site.name)
        kept.append(site if owner == site.name else replace(site, tied=owner))
    return kept


def _containers(modules: dict[str, nn.Module], skeleton: Skeleton, leaves: list[Site]) -> list[Site]:
    inside: dict[str, list[Site]] = {name: [] for name in skeleton.blocks}
    for site in leaves:
        block = skeleton.block_of(site.name)
        if block is not None:
            inside[block.name].append(site)
    found: list[Site] = []
    for name, block in skeleton.blocks.items():
        make: Callable[..., Site] = partial(Site, layer=block.layer, stack=block.stack)
        found.append(make(name, "block", "block", modules[name]))
        for sub in sublayers(name, inside[name]):
            ends = {"entry": modules[sub.entry], "exit": modules[sub.exit]}
            found.append(make(sub.name, sub.kind, sub.kind, modules[sub.name], component=sub.kind, **ends))
    return found
