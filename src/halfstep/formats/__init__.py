"""Number formats as frozen records: which numbers exist, and how a real number is rounded to one of them."""

from halfstep.formats.codebook import Codebook
from halfstep.formats.floating import E2M1, E4M3, E5M2, Floating
from halfstep.formats.format import Format
from halfstep.formats.integer import Integer

__all__ = ["E2M1", "E4M3", "E5M2", "Codebook", "Floating", "Format", "Integer"]
