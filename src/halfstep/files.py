"""Files that appear whole or not at all, and directories that one process uses at a time."""

from __future__ import annotations

import errno
import os
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from halfstep.errors import RunError

LOCK = ".lock"


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A temporary name to write to; what was written gets the name ``path`` when the block ends, and is on the disk.

    Raises:
        RunError: if it cannot be written; nothing is left of it then, and what ``path`` was before is still there.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror}; choose a directory you own, with space"
        ) from error
    finally:
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all.

    Raises:
        RunError: if it cannot be written.
    """
    with appearing(path) as temporary:
        temporary.write_bytes(content)


def are_one(path: Path, other: Path) -> bool:
    """Whether two paths lead to one file that is there, so that writing to either would lose what it holds."""
    return path.exists() and other.exists() and path.samefile(other)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # directories cannot be opened there
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


#: Open locks; a forked child lets go of its copies, or it would hold them when the parent is gone.
_LOCKS: weakref.WeakSet[IO[bytes]] = weakref.WeakSet()


def _drop_locks() -> None:
    for lock in list(_LOCKS):
        lock.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_locks)


def lock(folder: Path) -> IO[bytes]:
    """An open file that holds a directory's lock; the system lets go of it when the process ends, however it ends.

    Warns where the file system knows no locks.

    Raises:
        RunError: if the directory cannot be written, or another process holds its lock.
    """
    import fcntl  # not on every system, and needed for directories only

    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("ab")
    except OSError as error:
        raise RunError(
            f"directory {folder} cannot be written: {error.strerror}; choose another one"
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            file.close()
            raise RunError(
                f"directory {folder} is in use by another process; wait for it, or choose another directory"
            ) from error
        warnings.warn(
            f"directory {folder} cannot be locked ({error.strerror}): see to it that no other process uses it",
            stacklevel=4,
        )
    _LOCKS.add(file)
    return file
