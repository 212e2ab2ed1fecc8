"""One self-contained page: its frame, its style, and the only scripts that a browser will run on it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from tunewise.core.errors import UserError

__all__ = ["render", "script", "write_page"]


def script(name: str) -> str:
    """The text of one of the page's own scripts."""
    return files("tunewise.study.report").joinpath(name).read_text(encoding="utf-8")


def render(template: str, scripts: Sequence[str], **values: Any) -> str:
    """The page of a template. Its policy forbids every request and every script but these, by their hashes."""
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup, escape

    from tunewise import __version__

    def breakable(text: object) -> Markup:
        """Names of methods may go on in the next line before a bracket and after an underscore or a comma."""
        shown = str(escape(text)).replace("(", "<wbr>(").replace("_", "_<wbr>").replace(",", ",<wbr>")
        return Markup(shown)

    loader = PackageLoader("tunewise.study.report", ".")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["breakable"] = breakable
    # A text that ends the element would be cut off there; in JavaScript the two spellings mean the same.
    texts = [text.replace("</script", "<\\/script") for text in scripts]
    hashes = [base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for t in texts]
    return environment.get_template(template).render(
        scripts=[Markup(text) for text in texts],
        policy=Markup(" ".join(f"'sha256-{h}'" for h in hashes)),
        version=__version__,
        **values,
    )


def write_page(path: Path, page: str) -> Path:
    """Written beside its place and renamed, so that a reader never sees half a page. Raises `UserError`."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(page, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise UserError(f"The report {path} cannot be written: {error.strerror}.") from None
    return path
