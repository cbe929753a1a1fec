"""What was seen at a site: one pass, fixed memory, exactly mergeable."""

from halfstep.statistics.histogram import Histogram
from halfstep.statistics.keys import Float64, Int64

__all__ = ["Float64", "Histogram", "Int64"]
