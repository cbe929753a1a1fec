"""The journal of a run: what was done, line by line, so that a killed run goes on where it was.

A directory holds ``journal.jsonl`` (append-only, a line an entry) and ``checkpoints/`` (safetensors). Every line
carries a checksum over itself and all lines before it. Nothing is ever unpickled. Resuming is replaying: the same
code runs again, evaluations that are in the journal are answered from it, and entries that are there already are
not written twice.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self

import torch

from halfstep.errors import RunError
from halfstep.files import lock, write_whole

FILE, CHECKPOINTS = "journal.jsonl", "checkpoints"


#: What a run leaves in its directory; the rest of what lies there is not the run's.
LEFT = (
    *(FILE, f"{FILE}.damaged", CHECKPOINTS, "config.yaml", "outcome.json", "report.html"),
    *("model.onnx", "model.onnx.*", "float.onnx", "float.onnx.*", "refused.onnx", "refused.onnx.*"),
    *("training*.safetensors", "control"),
)


_HEAD, _MIDDLE, _TAIL = b'{"check":"', b'","entry":', b"}\n"


_DIGITS = 16

#: Kinds of which the last entry counts: the last of all, or of those that are equal in these fields.
_LAST: Mapping[str, tuple[str, ...]] = {
    "settings": (),
    "environment": (),
    "sweep": (),
    "sites": (),
    "picture": (),
    "outcome": (),
    "step": ("rung",),
    "checkpoint": ("name", "key"),
}


@dataclass(frozen=True)
class Entry:
    """A line of the journal.

    Attributes:
        kind: what it tells of: ``claim``, ``evaluation``, ``decision``, ``rung``, ``checkpoint``, ...
        at: seconds since 1970.
        data: the rest, as JSON knows it.
    """

    kind: str
    at: float
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """A checkpoint.

    Attributes:
        tensors: as they were saved.
        data: what was saved beside them.
    """

    tensors: dict[str, torch.Tensor]
    data: dict[str, Any]


class Journal:
    """The record of one run, kept in a directory, or only in memory.

    Use it as a context manager: it holds a lock on the directory while it is open.

    Args:
        folder: the run's directory, made if need be; None keeps everything in memory.
        fresh: begin anew: what an earlier run left in the directory is moved to ``earlier-1`` (or -2, ...) in it.

    Raises:
        RunError: if the directory cannot be written, another process has it open, or its first line is damaged.
    """

    def __init__(self, folder: str | Path | None = None, fresh: bool = False) -> None:
        self.folder = None if folder is None else Path(folder)
        self.entries: list[Entry] = []
        self.resumed = False
        self._check = ""
        self._known: set[str] = set()
        self._last: dict[tuple[Any, ...], str] = {}
        self._lock: IO[bytes] | None = None
        if self.folder is not None:
            self._lock = lock(self.folder)
            try:
                if fresh:
                    _set_aside(self.folder)
                self._resume(self.folder)
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes use the directory."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def write(self, kind: str, *, measured: Mapping[str, Any] | None = None, **data: Any) -> None:
        """Append an entry, unless the very same one is there already; it is on the disk when this returns.

        Where the last entry of a kind counts, "there" means that it is that last one.

        Args:
            kind: what it tells of.
            measured: figures that no two runs share, such as seconds; entries that differ only there are the same.
            data: what JSON knows.

        Raises:
            RunError: if it cannot be written (a full disk, say); what was written before stays good.
        """
        data = finite(data)
        known = _text(kind, data)
        there = self._last.get(_series(kind, data)) == known if kind in _LAST else known in self._known
        if there:
            return
        if measured:
            data["measured"] = finite(dict(measured))
        entry = Entry(kind, round(time.time(), 3), data)
        if self.folder is not None:
            line, check = _line(entry, self._check)
            path = self.folder / FILE
            try:
                with path.open("ab") as file:
                    start = file.tell()
                    try:
                        file.write(line)
                        file.flush()
                        os.fsync(file.fileno())
                    except OSError:
                        os.truncate(path, start)
                        raise
            except OSError as error:
                raise RunError(
                    f"cannot write {path}: {error.strerror}; once that is cured, run the same command again: it goes "
                    "on from here"
                ) from error
            self._check = check
        self.entries.append(entry)
        self._remember(entry, known)

    def _remember(self, entry: Entry, text: str) -> None:
        self._known.add(text)
        if entry.kind in _LAST:
            self._last[_series(entry.kind, entry.data)] = text

    def of(self, kind: str) -> list[Entry]:
        """All entries of a kind, in order."""
        return [entry for entry in self.entries if entry.kind == kind]

    def claim(self, what: str, digest: str, words: bool = False, hint: str = "") -> None:
        """Say which model, data or configuration this run is about; a run in a used directory must say the same.

        Args:
            what: "model", "recipe", "metric" ...
            digest: of its content.
            words: whether that is words to be read.
            hint: what may help whoever is refused.

        Raises:
            RunError: if the directory belongs to another one.
        """
        for entry in self.of("claim"):
            if entry.data["what"] == what and entry.data["digest"] != digest:
                both = f" ({entry.data['digest']}, now {digest})" if words else ""
                raise RunError(
                    f"directory {self.folder} belongs to a run with another {what}{both}; choose another directory, or "
                    f"begin anew in this one with fresh=True (--fresh){hint and f'. {hint}'}"
                )
        self.write("claim", what=what, digest=digest)

    def claimed(self, what: str) -> bool:
        """Whether :meth:`claim` has been called for ``what``, in this run or an earlier one of the directory."""
        return any(entry.data["what"] == what for entry in self.of("claim"))

    def changed(self, kind: str, **data: Any) -> bool:
        """Write an entry, and say whether an earlier one of its kind was another."""
        earlier = self.of(kind)
        self.write(kind, **data)
        return any(entry.data != finite(data) for entry in earlier)

    def save(
        self,
        name: str,
        tensors: Mapping[str, torch.Tensor],
        key: str = "",
        data: Mapping[str, Any] | None = None,
    ) -> None:
        """Keep tensors under ``name``: a file that appears whole, then a line with its checksum.

        Without a directory nothing is kept, since nothing can go on from it.

        Args:
            name: of the file, but for what the key adds.
            tensors: by name.
            key: what they depend on; for each key there is a file.
            data: to be kept beside them, as JSON knows it.

        Raises:
            RunError: if they cannot be written.
        """
        if self.folder is None:
            return
        from safetensors.torch import save

        content = save({part: tensor.detach().cpu().contiguous().clone() for part, tensor in tensors.items()})
        digest = hashlib.sha256(content).hexdigest()
        file = f"{CHECKPOINTS}/{name}{'-' * bool(key)}{key[:8]}.safetensors"
        write_whole(self.folder / file, content)
        self.write("checkpoint", name=name, file=file, key=key, sha256=digest, data=dict(data or {}))

    def load(self, name: str, key: str = "") -> Saved | None:
        """What was last saved under ``name`` and ``key``; None if nothing was, or (with a warning) nothing whole."""
        if self.folder is None:
            return None
        known = [entry.data for entry in self.of("checkpoint") if entry.data["name"] == name]
        if not any(data.get("key", "") == key for data in known):
            return None
        try:
            return read_checkpoint(self.folder, self.entries, name, key)
        except RunError as error:
            warnings.warn(f"{error}: what it held is computed again", stacklevel=2)
            return None

    def _resume(self, folder: Path) -> None:
        path = folder / FILE
        if not path.exists():
            return
        content = path.read_bytes()
        entries, good, self._check = _parse(content)
        if good < len(content):
            rest = content[good:]
            if not entries and b"\n" in rest:
                raise RunError(f"{path}, line 1 is damaged: nothing in it can be trusted; delete {folder}")
            if b"\n" in rest:  # more than a line cut short by a kill
                write_whole(folder / f"{FILE}.damaged", rest)
                warnings.warn(
                    f"{path} is damaged from line {len(entries) + 1} on: going on from the lines before; the rest is "
                    f"in {FILE}.damaged",
                    stacklevel=3,
                )
            os.truncate(path, good)
        self.entries = entries
        self.resumed = bool(entries)
        for entry in entries:
            self._remember(entry, _text(entry.kind, entry.data))


def read(folder: str | Path) -> list[Entry]:
    """The entries of a run's journal, for reading only: a run that is still going on is read up to its last line.

    Raises:
        RunError: if there is no journal, or it is damaged.
    """
    path = Path(folder) / FILE
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RunError(
            f"{path}: {error.strerror}; needed the directory of a run of halfstep quantize"
        ) from error
    entries, good, _ = _parse(content)
    if b"\n" in content[good:] or not entries:
        raise RunError(
            f"{path}, line {len(entries) + 1} is damaged; run the same quantize command again, it goes on from the "
            "line before"
        )
    return entries


def read_checkpoint(folder: Path, entries: Sequence[Entry], name: str, key: str = "") -> Saved:
    """What was last saved under ``name`` and ``key`` in a run's directory.

    Raises:
        RunError: if there is nothing, or the file is missing or not what was written.
    """
    known = [entry.data for entry in entries if entry.kind == "checkpoint" and entry.data["name"] == name]
    known = [data for data in known if data.get("key", "") == key]
    if not known:
        raise RunError(f"{folder}: has no checkpoint {name!r}")
    return Saved(_read_tensors(folder, known), known[-1].get("data", {}))


def _read_tensors(folder: Path, known: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """The tensors in a file, which must be as one of the entries about it says.

    A file may be newer than its last entry, if the run was killed between the two.
    """
    from safetensors.torch import load

    path = folder / known[-1]["file"]
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RunError(f"checkpoint {path} is missing") from error
    if hashlib.sha256(content).hexdigest() not in {data["sha256"] for data in known}:
        raise RunError(f"checkpoint {path} is damaged")
    return dict(load(content))


def finite(value: Any) -> Any:
    """``value`` with None for numbers that JSON does not know: NaN and the infinities."""
    if isinstance(value, Mapping):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _series(kind: str, data: Mapping[str, Any]) -> tuple[Any, ...]:
    """The entries that an entry is the last one of."""
    return kind, *(data.get(field) for field in _LAST.get(kind, ()))


def exact(value: Any) -> Any:
    """``value`` with every float as text that :func:`float` reads again, NaN and the infinities included."""
    if isinstance(value, Mapping):
        return {name: exact(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [exact(part) for part in value]
    return repr(value) if isinstance(value, float) else value


def _text(kind: str, data: Mapping[str, Any]) -> str:
    return json.dumps([kind, {name: data[name] for name in sorted(data) if name != "measured"}])


def _line(entry: Entry, before: str) -> tuple[bytes, str]:
    body = json.dumps({"kind": entry.kind, "at": entry.at, **entry.data}, separators=(",", ":")).encode()
    check = _checksum(before, body)
    return _HEAD + check.encode() + _MIDDLE + body + _TAIL, check


def _checksum(before: str, body: bytes) -> str:
    return hashlib.sha256(before.encode() + body).hexdigest()[:_DIGITS]


def _parse(content: bytes) -> tuple[list[Entry], int, str]:
    """The entries up to the first line that is not whole, the bytes they take, and the last checksum."""
    entries: list[Entry] = []
    good, check = 0, ""
    begin = len(_HEAD) + _DIGITS + len(_MIDDLE)
    for line in content.splitlines(keepends=True):
        body = line[begin : -len(_TAIL)]
        expected = _checksum(check, body)
        if line != _HEAD + expected.encode() + _MIDDLE + body + _TAIL:
            break
        data = json.loads(body)
        entries.append(Entry(data.pop("kind"), data.pop("at"), data))
        good, check = good + len(line), expected
    return entries, good, check


def _set_aside(folder: Path) -> None:
    """Move what an earlier run left into a folder of its own."""
    left = sorted({path for pattern in LEFT for path in folder.glob(pattern)})
    if not left:
        return
    number = 1
    while (place := folder / f"earlier-{number}").exists():
        number += 1
    try:
        place.mkdir()
        for path in left:
            path.rename(place / path.name)
    except OSError as error:
        raise RunError(f"cannot move what lies in {folder} to {place}: {error.strerror}") from error
