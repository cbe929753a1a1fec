"""Replacing an ONNX file, and the weights that lie beside it, so that whole files alone are ever there."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from halfstep.errors import ExportError
from halfstep.files import sync
from halfstep.runtime.file import parts


@contextmanager
def replacing(path: Path, write: Callable[[Path], None]) -> Iterator[Path]:
    """The new file under a temporary name beside ``path``; renamed when the block ends well, removed when it does not.

    Weights beside a file are called after their content, so those of the old file stay until the new one, whose rename
    comes last, has taken its place: killed at any moment, or cut off from power, there is the old file or the new one.
    What killed calls left is removed.

    Args:
        path: of the file.
        write: writes it, and its weights beside it, given the temporary path.

    Raises:
        ExportError: if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        directory = tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise ExportError(
            f"cannot write to {path.parent}: {error.strerror}; choose a directory you own"
        ) from error
    with directory as name, _locked(Path(name)):
        temporary = Path(name) / path.name
        try:
            write(temporary)
        except OSError as error:
            raise ExportError(f"cannot write {path}: {error.strerror}") from error
        yield temporary
        try:
            _publish(temporary, path)
        except OSError as error:
            raise ExportError(f"cannot write {path}: {error.strerror}") from error


def _publish(temporary: Path, path: Path) -> None:
    """Weights first, the file that names them last, each on the disk before it gets its name."""
    file, *weights = parts(temporary)
    for part in (*weights, file):
        sync(part)
    for part in weights:
        os.replace(part, path.with_name(part.name))
    sync(path.parent)
    os.replace(file, path)
    sync(path.parent)
    kept = {part.name for part in weights}
    for other in path.parent.iterdir():
        if (
            re.fullmatch(rf"{re.escape(path.name)}(\.[0-9a-f]{{16}})?\.data", other.name)
            and other.name not in kept
        ):
            other.unlink(missing_ok=True)


def _remove_abandoned(path: Path) -> None:
    """Remove the temporary folders of calls that were killed: nobody holds their locks."""
    for folder in path.parent.iterdir():
        if folder.name.startswith(f".{path.name}.") and folder.is_dir():
            with suppress(OSError), _locked(folder, must=True):
                shutil.rmtree(folder)


@contextmanager
def _locked(folder: Path, must: bool = False) -> Iterator[None]:
    """Hold the lock of a folder, which ends with this process; where there are no locks, go on if it need not be.

    Raises:
        OSError: if it must be held, and cannot be.
    """
    try:
        import fcntl  # not on every system
    except ImportError as error:
        if must:
            raise OSError("no locks here") from error
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(*() if must else (OSError,)):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)
