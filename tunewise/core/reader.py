"""Reading short expressions (selectors, recipes) with Python's own parser, and never running them."""

from __future__ import annotations

import ast
import keyword
import re

from tunewise.core.errors import UserError

__all__ = ["literal", "parse", "source_of"]

_TOKEN = re.compile(
    r"""("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')"""  # strings stay as they are
    r"""|((?:\.{0,2}/|[A-Za-z_])[^\s()\[\]{}"',|&~+=:*]*\.py:[A-Za-z_]\w*)"""  # ./mine.py:hira
    r"""|([A-Za-z_]\w*(?:\.\w+)*)"""  # layers.3.mlp.down_proj
    r"""|(\d[\w.]*)"""  # a number's e and dots are no name
    r"""|(#)"""  # a comment would be dropped without a word
)
_KEPT = {"and", "or", "not", "in", "is", "if", "else", "for", "True", "False", "None"}
_WORDS = {
    "true": True,
    "True": True,
    "false": False,
    "False": False,
    "null": None,
    "none": None,
    "None": None,
}
_LONGEST, _MOST = 20_000, 300


def _plain(match: re.Match[str]) -> str:
    word = match[0]
    if match[5]:
        return "?"
    plain = word.isidentifier() and word.isascii() and not keyword.iskeyword(word)
    return word if plain or match[1] or match[4] or word in _KEPT else "x" * len(word.encode())


def parse(text: str, what: str) -> ast.expr:
    """The expression in `text`, where dotted names, `file.py:name` and keywords (`lambda`) are plain names.

    `what` names the text in errors ("selector", "method").  Names come back as written: `Name.id` and
    `keyword.arg` may hold `layers.3.mlp` or `./mine.py:hira`.  Nothing is run.  UserError at a bad place.
    """
    text = " ".join(text.split("\n")).strip()
    if not text:
        raise UserError(f"The {what} is empty.")
    if len(text) > _LONGEST:
        raise UserError(f"The {what} has {len(text)} characters; at most {_LONGEST} are read.")
    try:
        tree = ast.parse(_TOKEN.sub(_plain, text), mode="eval").body
    except SyntaxError as error:
        raise _bad(text, what, error) from None
    except (ValueError, RecursionError, MemoryError):
        raise UserError(
            f"The {what} cannot be read: it is nested too deeply or has a character that is not text."
        ) from None
    nodes, raw = list(ast.walk(tree)), text.encode()
    if sum(isinstance(node, ast.BinOp | ast.UnaryOp | ast.Call | ast.Subscript) for node in nodes) > _MOST:
        raise UserError(
            f"The {what} has more than {_MOST} operations; several selectors can be given as a list."
        )
    for node in nodes:
        if isinstance(node, ast.Name):
            node.id = raw[node.col_offset : node.end_col_offset].decode()
        elif isinstance(node, ast.keyword) and node.arg is not None:
            node.arg = raw[node.col_offset : node.col_offset + len(node.arg)].decode()
    return tree


def _bad(text: str, what: str, error: SyntaxError) -> UserError:
    place = max((error.offset or 1) - 1, 0)
    rest = text[place : place + 20]
    where = f'at character {place + 1}, "{rest}"' if rest else "at its end"
    hint = " (a name with * goes in quotes)" if "*" in text and '"' not in text else ""
    return UserError(f'The {what} "{text}" cannot be read {where}{hint}.')


def source_of(node: ast.AST) -> str:
    """The expression as text again, for messages."""
    return ast.unparse(node)


def literal(node: ast.expr, what: str = "value") -> object:
    """The value of a number, string, bool, None, list, tuple or dict (`true`, `null` too); else UserError."""
    match node:
        case ast.Constant(value=str() | int() | float() | None as value):
            return value
        case ast.Name(id=word) if word in _WORDS:
            return _WORDS[word]
        case ast.UnaryOp(
            op=ast.USub() | ast.UAdd() as sign, operand=ast.Constant(value=int() | float() as number)
        ):
            return -number if isinstance(sign, ast.USub) else +number
        case ast.List(elts=items):
            return [literal(item, what) for item in items]
        case ast.Tuple(elts=items):
            return tuple(literal(item, what) for item in items)
        case ast.Dict(keys=keys, values=values) if None not in keys:
            return {
                literal(k, what): literal(v, what) for k, v in zip(keys, values, strict=True) if k is not None
            }
        case ast.Name(id=word):
            raise UserError(f'The {what} {word} is not known here; a text goes in quotes: "{word}".')
    raise UserError(f"The {what} {source_of(node)} is not a plain number, text, list or mapping.")
