"""A run on several ranks of torch.distributed: who they are, and how work is shared among them."""

from halfstep.distributed.crew import Crew, crew, current, in_turns, keep, together
from halfstep.distributed.messages import StatePart
from halfstep.distributed.ranks import Ranks, joined
from halfstep.distributed.share import Share, share

__all__ = [
    "Crew",
    "Ranks",
    "Share",
    "StatePart",
    "crew",
    "current",
    "in_turns",
    "joined",
    "keep",
    "share",
    "together",
]
