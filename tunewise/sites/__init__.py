"""What a model is made of: sites with roles and sizes, selectors over them, and a probe of what is called."""

from .probe import Calls, count_calls
from .select import select
from .site import KINDS, Site, find_sites
from .widths import with_widths

__all__ = ["KINDS", "Calls", "Site", "count_calls", "find_sites", "select", "with_widths"]
