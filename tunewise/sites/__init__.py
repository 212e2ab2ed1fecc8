"""What a model is made of: sites with roles and sizes, selectors over them, and a probe of what is called."""

from .modules import Tied, device_of, hide_from_saving, refuse_wrapped, swapped, tie, untie
from .probe import Calls, count_calls
from .quantized import (
    beside,
    dequantized,
    is_quantized,
    put_weight,
    read_weight,
    rounded,
    rounding_errors,
)
from .select import select
from .signals import Signals
from .site import KINDS, Site, find_sites
from .widths import with_widths

__all__ = [
    "KINDS",
    "Calls",
    "Signals",
    "Site",
    "Tied",
    "beside",
    "count_calls",
    "dequantized",
    "device_of",
    "find_sites",
]
__all__ += ["hide_from_saving", "is_quantized", "put_weight", "read_weight", "refuse_wrapped", "rounded"]
__all__ += ["rounding_errors", "select", "swapped", "tie", "untie", "with_widths"]
