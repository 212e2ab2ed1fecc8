"""Selectors: short expressions that name sites, `"query | value"`, `"mlp & layers[6:]"`, `"re:.*q_proj"`."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch

from tunewise.core.errors import UserError, did_you_mean
from tunewise.core.reader import literal, parse, source_of

from .site import KINDS, Site

__all__ = ["select"]

Atom = tuple[int, str | None]
"""A site's index in model order, and one role of a fused linear (None: the whole site)."""
_NOT_LINEAR = {"head", "pooler", "router"}


def select(
    sites: Sequence[Site], selector: str | Iterable[str], *, kinds: Iterable[str] | None = None
) -> list[Site]:
    """The sites that `selector` names, in model order; a list of selectors means their union.

    Terms: roles (`query`), kinds (`norm`), `attention`, `mlp`, stacks (`encoder`), `linear` (inside blocks;
    never head, pooler or router), `all`, `layers[6:]`, `layers[-1]`, `layers[0, 2]` (counted per stack), a
    module's full name or its end (`attention.self.query`), a module that holds sites, quoted names with
    `*`; joined by `|`, `&`, `~`.  `re:...` is one regular expression over whole names.  `kinds` restricts to
    what the caller can use: `mlp` means the MLP modules if "mlp" is among the kinds, else what lies inside.
    Roles of a fused linear are narrowed: `rows`, `out_features` and `role` ("query|value") are set.
    Raises UserError for a term that matches nothing.
    """
    allowed = set(KINDS if kinds is None else kinds)
    query = _Query(sites, [site for site in sites if site.kind in allowed], allowed)
    texts = [selector] if isinstance(selector, str) else list(selector)
    if not texts:
        raise UserError("The list of selectors is empty.")
    chosen: set[Atom] = set()
    for text in texts:
        found = query.text(text)
        if not found:
            raise UserError(f'The selector "{text}" selects no site of this model.')
        chosen |= found
    return query.regroup(chosen)


@dataclass
class _Query:
    every: Sequence[Site]
    sites: list[Site]
    kinds: set[str]

    def atoms(self, test: Callable[[Site], bool] | None = None) -> set[Atom]:
        return {
            (index, role)
            for index, site in enumerate(self.sites)
            if test is None or test(site)
            for role in (*_parts(site),) or (None,)
        }

    def text(self, text: str) -> set[Atom]:
        if not text.strip().startswith("re:"):
            return self.expression(parse(text, "selector"), text)
        pattern = text.strip()[3:].strip()
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise UserError(f'The selector "{text}" is no regular expression: {error}.') from None
        return self.atoms(lambda site: compiled.fullmatch(site.name) is not None)

    def expression(self, node: ast.expr, text: str) -> set[Atom]:
        match node:
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                return self.expression(left, text) | self.expression(right, text)
            case ast.BinOp(left=left, op=ast.BitAnd(), right=right):
                return self.expression(left, text) & self.expression(right, text)
            case ast.UnaryOp(op=ast.Invert(), operand=operand):
                return self.atoms() - self.expression(operand, text)
            case ast.Name(id=name) | ast.Constant(value=str() as name):
                return self.term(name)
            case ast.Subscript(value=ast.Name(id="layers"), slice=index):
                return self.layers(index)
            case ast.BoolOp() | ast.Tuple() | ast.UnaryOp(op=ast.Not()):
                raise UserError(f'In the selector "{text}" write | for "or", & for "and", ~ for "not".')
        raise UserError(
            f'In the selector "{text}" the part "{source_of(node)}" is not understood; '
            "terms are roles, kinds, layers[...] and module names, joined by |, & and ~."
        )

    def term(self, name: str) -> set[Atom]:
        if name == "all":
            return self.atoms()
        if name == "linear":
            layered = any(site.kind == "block" for site in self.every)
            linear = self.atoms(lambda site: site.kind == "linear" and site.role not in _NOT_LINEAR)
            found = {atom for atom in linear if not layered or self.sites[atom[0]].layer is not None}
        elif name in self.kinds:
            found = self.atoms(lambda site: site.kind == name)
        elif name in ("attention", "mlp"):
            found = self.atoms(lambda site: site.component == name)
        else:
            found = self.atoms(lambda site: name in (site.role, site.stack))
            found |= {atom for atom in self.atoms() if atom[1] == name}
        found = found or self.modules(name)
        if not found:
            raise self.unknown(name)
        return found

    def modules(self, name: str) -> set[Atom]:
        """A site with this name or name ending, else the sites inside the modules with this name."""
        found = self.atoms(lambda site: fnmatchcase("." + site.name, "*." + name))
        return found or self.atoms(lambda site: fnmatchcase("." + site.name, f"*.{name}.*"))

    def layers(self, index: ast.expr) -> set[Atom]:
        depth: dict[str | None, int] = {}
        for site in self.every:
            if site.layer is not None:
                depth[site.stack] = max(depth.get(site.stack, 0), site.layer + 1)
        parts = index.elts if isinstance(index, ast.Tuple) else [index]
        wanted = {(stack, n) for stack, size in depth.items() for part in parts for n in _picked(part, size)}
        if not wanted:
            known = f"has layers 0 to {max(depth.values()) - 1}" if depth else "has no repeated layers"
            raise UserError(f'"layers[{source_of(index)}]" selects nothing: this model {known}.')
        return self.atoms(lambda site: (site.stack, site.layer) in wanted)

    def unknown(self, name: str) -> UserError:
        hidden = next((s for s in self.sites if s.role in ("qkv", "kv") and not s.roles), None)
        if hidden and name in ("query", "key", "value"):
            return UserError(
                f'"{name}" cannot be told apart: the row order of the fused {hidden.name} '
                f'is not known for its class; "{hidden.role}" selects all of it.'
            )
        other = next((s for s in self.every if s.kind not in self.kinds and name in _words(s)), None)
        if other:
            usable = ", ".join(sorted(self.kinds))
            return UserError(
                f'"{name}" matches only {other.kind} sites ({other.name}); here {usable} can be used.'
            )
        known = {"all", "linear"}.union(*map(_words, self.sites))
        return UserError(f'"{name}" matches no site of this model' + did_you_mean(name, sorted(known)))

    def regroup(self, chosen: set[Atom]) -> list[Site]:
        result = []
        for index, site in enumerate(self.sites):
            roles = [role for role in _parts(site) if (index, role) in chosen]
            if roles and len(roles) < len(_parts(site)):
                result.append(_narrow(site, roles))
            elif roles or (index, None) in chosen:
                result.append(site)
        return result


def _parts(site: Site) -> list[str]:
    """Roles of a fused site that can be chosen singly; of a narrowed one those it still has."""
    return [role for role in site.roles if site.rows is None or role in site.role.split("|")]


def _words(site: Site) -> set[str]:
    own = {site.role, site.kind, site.stack, site.component, site.name.rpartition(".")[2], *site.roles}
    return {word for word in own if word}


def _narrow(site: Site, roles: list[str]) -> Site:
    rows = torch.cat([site.roles[role] for role in roles]).sort().values
    return replace(site, rows=rows, out_features=len(rows), role="|".join(roles))


def _picked(part: ast.expr, size: int) -> list[int]:
    layers = list(range(size))
    if isinstance(part, ast.Slice):
        ends = [None if end is None else _whole(end) for end in (part.lower, part.upper, part.step)]
        return layers[slice(*ends)] if ends[2] != 0 else []
    index = _whole(part)
    return [layers[index]] if -size <= index < size else []


def _whole(node: ast.expr) -> int:
    number = None if isinstance(node, ast.Name) else literal(node)
    if isinstance(number, int) and not isinstance(number, bool):
        return number
    raise UserError(f'In "layers[...]" stand whole numbers and ranges, not "{source_of(node)}".')
