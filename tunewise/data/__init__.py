"""From whatever the user has to rows, columns and splits, with every decision said aloud."""

from tunewise.data.columns import Columns, detect_columns, usable_rows
from tunewise.data.source import Rows, read_rows
from tunewise.data.splits import Splits, split_rows

__all__ = ["Columns", "Rows", "Splits", "detect_columns", "read_rows", "split_rows", "usable_rows"]
