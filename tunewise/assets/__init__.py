"""Small real models and data behind short names: fetched once, converted once, then used offline.

`MODELS` and `DATA` list what there is; `model_path("minilm")` is a plain Hugging Face folder;
`demo_rows("reviews")` is a list of dicts. Importing this package loads nothing heavy.
"""

from tunewise.assets.fetch import cache_dir
from tunewise.assets.index import ALIASES, DATA, MODELS, Asset, FixedSplits, fixed_splits
from tunewise.assets.models import model_path
from tunewise.assets.rows import demo_rows

__all__ = [
    "ALIASES",
    "DATA",
    "MODELS",
    "Asset",
    "FixedSplits",
    "cache_dir",
    "demo_rows",
    "fixed_splits",
    "model_path",
]
