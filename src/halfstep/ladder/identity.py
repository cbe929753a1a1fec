"""What a model, a metric and data are, as digests of their content."""

from __future__ import annotations

import hashlib
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from halfstep.evaluate import Several
from halfstep.graph.capture import Captured
from halfstep.graph.inputs import ModelInputs, call_arguments

#: An example is known by at most so many of its values, evenly spaced; big images need not be hashed whole.
VALUES = 4096


def model_digest(captured: Captured) -> str:
    """Of a captured network: its graph and every parameter and buffer."""
    digest = hashlib.sha256(str(captured.graph).encode())
    for name, tensor in sorted(captured.module.state_dict().items()):
        _add(digest, name, tensor)
    return digest.hexdigest()


def metric_digest(scorer: Any) -> str:
    """Of the code of a metric: its class, and the functions that it holds. What these refer to is not looked at.

    Of several metrics, of each with its name, in order.
    """
    digest = hashlib.sha256(type(scorer).__qualname__.encode())
    if isinstance(scorer, Several):
        for name, part in scorer.metrics.items():
            digest.update(f"{name!r} {metric_digest(part)}".encode())
    for name, value in sorted(vars(scorer).items()):
        if callable(value):
            digest.update(f"{name} {_code(value)}".encode())
        elif isinstance(value, (bool, int, float, str)):
            digest.update(f"{name} {value!r}".encode())
    return digest.hexdigest()


class Examples:
    """The digests of examples, collected as batches pass.

    Attributes:
        seen: a digest for each example's inputs, in order.
    """

    def __init__(self) -> None:
        self.seen: list[bytes] = []
        self._labelled: list[bytes] = []

    def add(self, inputs: ModelInputs, labels: Any = None) -> None:
        """Take in a batch."""
        tensors = _tensors(call_arguments(inputs))
        if not tensors or not tensors[0].dim():
            return
        count = len(tensors[0])
        self.seen += _rows(tensors, count)
        self._labelled += _rows([*tensors, *_tensors(labels)], count)

    def digest(self) -> str:
        """Of all examples with their labels, in whatever order they came."""
        return hashlib.sha256(b"".join(sorted(self._labelled))).hexdigest()


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _rows(tensors: Iterable[torch.Tensor], count: int) -> list[bytes]:
    """A digest for each of ``count`` examples; tensors without such a first dimension belong to none of them."""
    tables = []
    for tensor in tensors:
        if tensor.dim() and len(tensor) == count:
            flat = tensor.detach().cpu().reshape(count, -1)
            flat = flat[:, :: -(-flat.shape[1] // VALUES) or 1].contiguous()
            tables.append(flat.view(torch.uint8).numpy())
    return [
        hashlib.blake2b(b"|".join(table[index].tobytes() for table in tables), digest_size=8).digest()
        for index in range(count)
    ]


def _add(digest: Any, name: str, tensor: torch.Tensor) -> None:
    plain = tensor.detach().cpu().contiguous()
    digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
    digest.update(plain.reshape(-1).view(torch.uint8).numpy().data if plain.numel() else b"")


def _code(function: Callable[..., Any]) -> str:
    """A function's name and byte code; only the name where there is no byte code."""
    name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__qualname__)}"
    code = getattr(function, "__code__", None)
    return name if code is None else f"{name} {_code_parts(code)}"


def _code_parts(code: types.CodeType) -> str:
    constants = [
        _code_parts(value) if isinstance(value, types.CodeType) else repr(value) for value in code.co_consts
    ]
    return hashlib.sha256(repr((code.co_code, code.co_names, constants)).encode()).hexdigest()
