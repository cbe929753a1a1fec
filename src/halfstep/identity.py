"""What a value is, as a digest of its content: a model's tensors, a callable with all that it refers to, data.

Equal values have equal digests in every process. A digest covers all that the value computes from: arrays whole,
functions by byte code, defaults, closure and the functions that they call, objects by class and state, recursively.
Code that was installed (torch, numpy, halfstep itself) is known by its name. What cannot be read, such as an open file
or a generator, is listed.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import random
import re
import sys
import sysconfig
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

#: Values that their text tells whole.
_PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes, type(Ellipsis), range, slice, Path, re.Pattern),
    *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
)
#: What draws random numbers is known by its kind: its state moves on with every use.
_RANDOM = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator)
#: What a loader keeps for itself while it is iterated.
_PASSING = {"_iterator", "_DataLoader__multiprocessing_context", "_IterableDataset_len_called"}
#: What may hold values in a way of its own, and how to see them in the built-in way.
_CONTAINERS: Mapping[type, Callable[[Any], Any]] = {
    dict: lambda value: dict(dict.items(value)),
    list: lambda value: list(list.__iter__(value)),
    tuple: lambda value: tuple(tuple.__iter__(value)),
    set: lambda value: set(set.__iter__(value)),
    frozenset: lambda value: frozenset(frozenset.__iter__(value)),
    deque: lambda value: list(deque.__iter__(value)),
}
#: What a class holds beside what its author wrote.
_NOT_WRITTEN = {
    *("__dict__", "__weakref__", "__module__", "__doc__", "__annotations__", "__firstlineno__"),
    *("__static_attributes__", "__abstractmethods__", "_abc_impl", "__parameters__", "__orig_bases__"),
}
_INSTALLED = tuple(
    Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")
)

#: A value is its kind, a text or bytes, and other values, each with words for where it was found.
_Anatomy = tuple[str, Any, Sequence[tuple[str, Any]]]


class Identity:
    """The content of values.

    Args:
        values: anything.

    Attributes:
        digest: 32 hexadecimal digits.
        unknown: what could not be read, by where it was found.
        surroundings: a digest of the global variables (no functions, classes or modules) that functions refer to by
            name; empty where there are none. They are apart because a script's counters and settings are among them,
            which need not matter.

    >>> Identity([1, "a"]).digest == Identity([1, "a"]).digest, Identity(1).digest == Identity(1.0).digest
    (True, False)
    """

    def __init__(self, *values: Any) -> None:
        self.unknown: list[str] = []
        self._known: dict[int, tuple[bytes, Any]] = {}  # by id; holding the values keeps their ids theirs
        self._open: list[int] = []  # the values that hold the one that is looked at, by id
        self._globals: dict[str, bytes] = {}
        self.digest = _hash("values", b"", [self._digest_of(value, "") for value in values]).hex()
        parts = [name.encode() + digest for name, digest in sorted(self._globals.items())]
        self.surroundings = _hash("globals", b"", parts).hex() if parts else ""

    def _digest_of(self, value: Any, where: str) -> bytes:
        if isinstance(value, _PLAIN) and not isinstance(value, enum.Enum):
            return _hash(type(value).__name__, repr(value).encode(), ())
        name = id(value)
        if name in self._known:
            return self._known[name][0]
        if name in self._open:  # it holds itself
            return _hash("cycle", str(len(self._open) - self._open.index(name)).encode(), ())
        self._open.append(name)
        kind, content, parts = self._anatomy(value, where)
        content = content.encode() if isinstance(content, str) else content
        digest = _hash(kind, content, [self._digest_of(part, place) for place, part in parts])
        self._open.pop()
        self._known[name] = digest, value
        return digest

    def _anatomy(self, value: Any, where: str) -> _Anatomy:
        if isinstance(value, torch.Tensor):
            return f"tensor {value.dtype} {tuple(value.shape)}", rows_of_bytes(value).data, ()
        if isinstance(value, (np.ndarray, np.generic)):
            return self._array(np.asarray(value), where)
        if isinstance(value, (*_CONTAINERS, Mapping)) and not _installed(type(value)):
            return self._object(value, where or type(value).__name__)
        if isinstance(value, Mapping) and type(value).__module__ in ("builtins", "collections", "types"):
            pairs = [
                pair for key, part in value.items() for pair in ((where, key), (f"{where}[{key!r}]", part))
            ]
            return type(value).__name__, "", pairs
        if isinstance(value, Set):
            return "set", b"".join(sorted(self._digest_of(part, where) for part in value)), ()
        if isinstance(value, (list, tuple)):
            return (
                type(value).__name__,
                "",
                [(f"{where}[{index}]", part) for index, part in enumerate(value)],
            )
        if isinstance(value, enum.Enum):
            return "enum", f"{_name(type(value))}.{value.name}", ()
        if isinstance(value, functools.partial):
            return (
                "partial",
                "",
                [(where, part) for part in (value.func, list(value.args), dict(value.keywords))],
            )
        if isinstance(value, types.MethodType):
            return "method", "", [(where, value.__func__), (where, value.__self__)]
        if isinstance(value, types.FunctionType):
            return self._function(value, where or value.__qualname__)
        if isinstance(value, type):
            return self._class(value, where or value.__qualname__)
        if isinstance(value, types.CodeType):
            consts = [(where, part) for part in value.co_consts]
            return "code", value.co_code + " ".join(value.co_names).encode(), consts
        if isinstance(value, types.BuiltinFunctionType):
            own = [] if isinstance(value.__self__, types.ModuleType) else [(where, value.__self__)]
            return "name", _name(value), own
        if isinstance(value, (types.ModuleType, np.ufunc, torch._ops.OpOverload)):
            return "name", _name(value), ()
        if isinstance(value, _RANDOM):
            return "random", _name(type(value)), ()
        return self._object(value, where or type(value).__name__)

    def _array(self, array: np.ndarray[Any, Any], where: str) -> _Anatomy:
        kind = f"array {array.dtype.str} {array.shape}"
        if array.dtype.hasobject:
            return kind, "", [(where, array.tolist())]
        return kind, rows_of_bytes(array).data, ()

    def _function(self, function: types.FunctionType, where: str) -> _Anatomy:
        """Code, defaults, closure, and what the code calls by name; of installed code the name and the closure."""
        code = function.__code__
        parts: list[tuple[str, Any]] = []
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                parts.append((f"{where}, variable {name}", cell.cell_contents))
            except ValueError:  # a name that is not bound yet
                parts.append((where, name))
        if _installed(function):
            return "function", _name(function), parts
        written = (code, function.__defaults__, function.__kwdefaults__, vars(function))
        parts += [(where, part) for part in written]
        parts += self._named(function.__globals__, str(function.__module__), _names(code), where)
        return "function", function.__qualname__, parts

    def _named(
        self,
        variables: Mapping[str, Any],
        owner: str,
        names: Sequence[str],
        where: str,
        walked: Set[str] = frozenset(),
    ) -> list[tuple[str, Any]]:
        """What the code that refers to ``names`` calls of a module's variables; the rest is added to the globals."""
        parts: list[tuple[str, Any]] = []
        for name in names:
            if name not in variables:
                continue
            value, place, full = variables[name], f"{where}, global {name}", f"{owner}.{name}"
            if isinstance(value, types.ModuleType) and not _installed(value):
                # of ``scores.topk`` the module's name and the function's stand in the same list
                inner = value.__name__
                if inner not in walked:
                    parts += self._named(vars(value), inner, names, place, walked | {inner})
            elif callable(value) or isinstance(value, types.ModuleType):
                parts.append((place, value))
            elif full not in self._globals:
                self._globals[full] = b""  # for globals that refer to themselves
                self._globals[full] = self._digest_of(value, place)
        return parts

    def _class(self, kind: type, where: str) -> _Anatomy:
        """What is written in every class of the user's own that it consists of."""
        parts: list[tuple[str, Any]] = []
        for base in kind.__mro__:
            if _installed(base):
                continue
            for name, part in vars(base).items():
                if name in _NOT_WRITTEN or isinstance(
                    part, (types.GetSetDescriptorType, types.MemberDescriptorType)
                ):
                    continue
                parts += [(where, name), (where, _written(part))]
        return "class", _name(kind), parts

    def _object(self, value: Any, where: str) -> _Anatomy:
        """Its class, and the state that it would be copied by."""
        kind = type(value)
        parts: list[tuple[str, Any]] = [(where, kind)]
        if isinstance(value, Iterator):
            self.unknown.append(f"{where} (a {kind.__name__}, which can be iterated only once)")
            return "object", "", parts
        state = state_of(value)
        if isinstance(value, DataLoader):
            state = {name: part for name, part in state.items() if name not in _PASSING}
        elif state is None:
            state = self._reduced(value, where)
        slots = {
            name: getattr(value, name)
            for base in kind.__mro__
            for name in _slots(base)
            if hasattr(value, name)
        }
        held = next((base for base in _CONTAINERS if isinstance(value, base)), None)
        content = [] if held is None else [(where, _CONTAINERS[held](value))]
        return "object", "", [*parts, (where, state), (where, slots), *content]

    def _reduced(self, value: Any, where: str) -> Any:
        """The parts that an object of compiled code would be pickled as; nothing is pickled."""
        if type(value).__module__ == "_thread":  # a lock has no content
            return None
        try:
            parts = value.__reduce_ex__(4)
        except Exception as error:  # whatever the object's own code raises
            self.unknown.append(f"{where} ({type(value).__name__}: {error})")
            return None
        if isinstance(parts, str):
            return parts
        return [list(part) if isinstance(part, Iterator) else part for part in parts]


def state_of(value: Any) -> Any:
    """The attributes of an object, or what its class says is its state (``__getstate__``); None where it has neither.

    A class says so to leave out what makes no difference, such as a cache.
    """
    own = getattr(type(value), "__getstate__", None)
    if isinstance(own, types.FunctionType) and not _installed(own):
        return value.__getstate__()
    return dict(vars(value)) if hasattr(value, "__dict__") else None


def rows_of_bytes(value: torch.Tensor | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The content of a tensor or of an array, (rows, bytes) uint8: a row for each entry of its first axis."""
    if isinstance(value, torch.Tensor):
        plain = value.detach()
        if plain.is_quantized:
            plain = plain.dequantize()
        if plain.layout is not torch.strided:
            plain = plain.to_dense()
        plain = plain.cpu().resolve_conj().resolve_neg().contiguous()
        rows = len(plain) if plain.dim() else 1
        if not plain.numel():
            return np.empty((rows, 0), np.uint8)
        return plain.reshape(rows, -1).view(torch.uint8).numpy()
    rows = len(value) if value.ndim else 1
    return np.ascontiguousarray(value).reshape(rows, -1).view(np.uint8)


def _hash(kind: str, content: Any, parts: Sequence[bytes]) -> bytes:
    digest = hashlib.blake2b(f"{kind} {len(content)} {len(parts)} ".encode(), digest_size=16)
    digest.update(content)
    for part in parts:
        digest.update(part)
    return digest.digest()


def _names(code: types.CodeType) -> list[str]:
    """Every name that the code and the code within it refer to, in order, each once."""
    inner = [name for part in code.co_consts if isinstance(part, types.CodeType) for name in _names(part)]
    return list(dict.fromkeys([*code.co_names, *inner]))


def _written(part: Any) -> Any:
    """The functions behind what a class's body makes of them."""
    if isinstance(part, (staticmethod, classmethod)):
        return part.__func__
    if isinstance(part, property):
        return [part.fget, part.fset, part.fdel]
    return part.func if isinstance(part, functools.cached_property) else part


def _name(value: Any) -> str:
    name = getattr(value, "__qualname__", getattr(value, "__name__", str(value)))
    return f"{getattr(value, '__module__', '')}.{name}"


def _slots(kind: type) -> list[str]:
    slots = vars(kind).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return [name for name in names if name not in ("__dict__", "__weakref__")]


@functools.cache
def _installed_module(name: str) -> bool:
    if name.partition(".")[0] in ("halfstep", "builtins"):
        return True
    if name == "__main__":
        return False
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None)
    if file is None:
        return module is not None  # compiled in, or a namespace
    path = Path(file).resolve()
    return any(path.is_relative_to(folder) for folder in _INSTALLED)


def _installed(value: Any) -> bool:
    """Whether code was installed, and is known by its name, rather than written for this run."""
    name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
    return isinstance(name, str) and _installed_module(name)
