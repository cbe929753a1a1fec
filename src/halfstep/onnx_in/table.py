"""The table of ONNX operators: each is a function of a node's attributes and of its inputs.

Inputs are tensors, or small *host* arrays of numpy: constants such as axes and sizes, and shapes, whose elements may be
the symbols that torch gives to dynamic dimensions. Where all that a node reads is on the host and shapes are what is
computed, the node is evaluated there (:mod:`.symbolic`), so that no shape ever depends on the values of a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from halfstep.errors import CaptureError

#: The domain of the operators that ONNX Runtime's optimizer writes.
MICROSOFT = "com.microsoft"

#: ONNX's numbers of element types.
DTYPES: dict[int, torch.dtype] = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    4: torch.uint16,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    12: torch.uint32,
    13: torch.uint64,
    16: torch.bfloat16,
}


@dataclass(frozen=True)
class Node:
    """A node of the file, as an operator of the table sees it.

    Attributes:
        name: the node's own.
        op_type: its operator.
        domain: of the operator; empty for ONNX's own.
        version: of that domain in the file.
        attributes: as numbers, strings, lists and numpy arrays.
        inputs: names of the tensors it reads, empty where it leaves one out.
        outputs: names of the tensors it makes, empty where nobody wants one.
        constant: which of its inputs are stored in the file.
        parts: the nodes of the file that it stands for, in order; empty where it is one itself.
        message: the node as the file has it, where its operator is not in the table.
        island: the key that it is run by, of such a node.
    """

    name: str
    op_type: str
    domain: str
    version: int
    attributes: Mapping[str, Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constant: frozenset[int] = frozenset()
    parts: tuple[Node, ...] = ()
    message: bytes = b""
    island: str = ""

    def __deepcopy__(self, memo: dict[int, Any]) -> Node:
        """Itself: nothing in it changes."""
        return self

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute, or what it is where the file leaves it out."""
        return self.attributes.get(name, default)

    @property
    def kind(self) -> str:
        """The operator with its domain and version, for messages."""
        return f"{self.domain or 'ai.onnx'} {self.op_type}, version {self.version}"

    def wanted(self, index: int) -> bool:
        """Whether anybody reads an output."""
        return index < len(self.outputs) and bool(self.outputs[index])


Function = Callable[..., Any]

#: By domain and operator.
TABLE: dict[tuple[str, str], Function] = {}


def operator(*names: str, domain: str = "") -> Callable[[Function], Function]:
    """Put a function of a node and its inputs into the table, under each of the names."""

    def register(function: Function) -> Function:
        for name in names:
            TABLE[domain, name] = function
        return function

    return register


def plain(functions: Mapping[str, Function], domain: str = "") -> None:
    """Put functions of tensors alone, without attributes, into the table."""
    for name, function in functions.items():
        TABLE[domain, name] = lambda node, *inputs, function=function: function(*map(tensor, inputs))


def unsupported(what: str) -> CaptureError:
    """The error of an operator that is in the table, but not with these attributes or inputs."""
    return CaptureError(
        f"{what} cannot be read; rewrite it with other operators, or take the part of the network without it"
    )


def host(x: Any) -> bool:
    """Whether a value is on the host."""
    return isinstance(x, np.ndarray)


def tensor(x: Any) -> Any:
    """A value as a tensor; None stays None."""
    if not host(x):
        return x
    if x.dtype != object:
        return torch.from_numpy(np.ascontiguousarray(x).reshape(x.shape).copy())
    items = list(x.reshape(-1))
    if not any(isinstance(item, torch.SymInt) for item in items):
        return torch.tensor([int(item) for item in items], dtype=torch.int64).reshape(x.shape)
    return torch.stack([torch.full((), item, dtype=torch.int64) for item in items]).reshape(x.shape)


def ints(x: Any, what: str) -> list[Any]:
    """A host value as a list of integers, some of which may be symbols.

    Raises:
        CaptureError: naming ``what`` it is, if it depends on the values of tensors.
    """
    if isinstance(x, (list, tuple)):
        return list(x)
    if not host(x):
        raise CaptureError(
            f"its {what} depend on the values of a tensor, which a fixed graph cannot express; make them constants, "
            "for instance by exporting with fixed sizes other than the batch"
        )
    return [item if isinstance(item, torch.SymInt) else int(item) for item in x.reshape(-1)]


def number(x: Any, what: str) -> Any:
    """A host value as one number.

    Raises:
        CaptureError: naming ``what`` it is, if it depends on the values of tensors, or is several.
    """
    if not host(x) or x.size != 1:
        raise CaptureError(f"its {what} must be one constant number")
    item = x.reshape(-1)[0]
    return item if isinstance(item, (int, torch.SymInt)) else item.item()


def axes(node: Node, given: Any, name: str = "axes") -> list[int] | None:
    """Axes from an attribute, as old operators have them, or from an input; None if neither is there."""
    if given is not None:
        return [int(axis) for axis in ints(given, name)]
    found = node.get(name)
    return None if found is None else [int(axis) for axis in found]
