"""What ranks send each other: calls and results by pickle, what all of them have by its name, errors by their words."""

from __future__ import annotations

import hashlib
import io
import pickle
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from halfstep.errors import HalfstepError, RankError


@dataclass(frozen=True)
class StatePart:
    """A part of an object's state, which is sent to other ranks when it has changed.

    Attributes:
        plain: data whose ``repr`` tells all.
        tensors: by name.
        large: what only ``plain`` tells whether it has changed.
    """

    plain: Any = None
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    large: Any = None

    def digest(self) -> bytes:
        """Equal for parts that are."""
        digest = hashlib.blake2b(repr(self.plain).encode(), digest_size=16)
        for name, tensor in self.tensors.items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.digest()


def said_of(error: BaseException) -> tuple[str, str]:
    """An error as it is sent: its class's name and its words."""
    return type(error).__name__, " ".join(str(error).split("\n")) or "no words"


def raised(said: tuple[str, str], rank: int) -> HalfstepError:
    """Another rank's error, to be raised here: of the same class where that is one of ours."""
    kinds = {kind.__name__: kind for kind in _below(HalfstepError)}
    name, words = said
    kind = kinds.get(name)
    if kind is None:
        return RankError(f"rank {rank}: {name}: {words}")
    return kind(words if words.startswith("rank ") else f"rank {rank}: {words}")


def _below(kind: type[HalfstepError]) -> Iterator[type[HalfstepError]]:
    yield kind
    for each in kind.__subclasses__():
        yield from _below(each)


class Unknown(Exception):
    """An object that other ranks do not have, and that is not sent; the words are its class's name."""


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, names: Mapping[int, str]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._names = names

    def persistent_id(self, value: Any) -> str | None:
        """The name of what every rank has."""
        name = self._names.get(id(value))
        if name is None and getattr(type(value), "known_by_name", isinstance(value, nn.Module)):
            raise Unknown(type(value).__name__)  # another model or metric: it stays with rank 0
        return name

    def reducer_override(self, value: Any) -> Any:
        """Tensors on a GPU go to the other rank's own one."""
        if isinstance(value, torch.Tensor) and value.device.type == "cuda":
            return torch.Tensor.cuda, (value.detach().cpu(),)
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, shared: Mapping[str, Any]) -> None:
        super().__init__(file)
        self._shared = shared

    def persistent_load(self, name: str) -> Any:
        found = self._shared[name]
        return found() if isinstance(found, weakref.ref) else found


def packed(message: tuple[Any, ...], names: Mapping[int, str]) -> bytes:
    """A message as bytes.

    Args:
        message: of what can be pickled.
        names: of what all ranks have, by ``id``.

    Raises:
        Unknown: something in it is only known by name, and not to all ranks.
    """
    file = io.BytesIO()
    _Pickler(file, names).dump(message)
    return file.getvalue()


def unpacked(content: bytes, shared: Mapping[str, Any]) -> Any:
    """What :func:`packed` has packed, with this rank's own of what all have; only ranks of one run are read."""
    return _Unpickler(io.BytesIO(content), shared).load()
