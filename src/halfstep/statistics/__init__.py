"""What was seen at a site: one pass, fixed memory, exactly mergeable."""

from halfstep.statistics.bins import Float64, Int64
from halfstep.statistics.channels import ChannelRange
from halfstep.statistics.distance import distance
from halfstep.statistics.histogram import Histogram
from halfstep.statistics.sparse import Sparse

__all__ = ["ChannelRange", "Float64", "Histogram", "Int64", "Sparse", "distance"]
