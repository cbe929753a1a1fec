"""Where a network comes from: the file, and what of it each module and parameter stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from halfstep.onnx_in.table import Node

if TYPE_CHECKING:
    from halfstep.onnx_in.reader import OnnxGraph


@dataclass(frozen=True)
class Origin:
    """A file that a network was read from.

    Attributes:
        source: what it says.
        steps: the nodes that are executed, by the path of their module, in order.
        tensors: names of stored tensors by the path of their parameter or buffer.
    """

    source: OnnxGraph
    steps: Mapping[str, Node]
    tensors: Mapping[str, str]

    def __deepcopy__(self, memo: dict[int, Any]) -> Origin:
        """Itself: nothing in it changes."""
        return self
