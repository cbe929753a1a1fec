"""What was seen at a site: one pass, fixed memory, exactly mergeable."""

from halfstep.statistics.histogram import Histogram

__all__ = ["Histogram"]
