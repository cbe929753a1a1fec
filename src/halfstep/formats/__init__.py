"""Number formats as frozen records: which numbers exist, and how a real number is rounded to one of them."""

from halfstep.formats.format import Format
from halfstep.formats.integer import Integer

__all__ = ["Format", "Integer"]
