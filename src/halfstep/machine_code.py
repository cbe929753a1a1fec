"""Machine code of numba's that outlives the process: a loop is compiled once for a processor, not once for a run.

Each compiled signature is a file of its own, named by the digest of all that it depends on: the sources of the
package that the loop is written in, its signature, the processor, and the versions of numba, LLVM's binding and
Python. So another processor or version finds nothing and compiles; nothing has to be invalidated. A file carries a
digest of its content: what is damaged is compiled again. Where nothing can be read or written, a process compiles for
itself, as numba does without a cache.

numba's own cache is not used because it refuses, when a function is defined, where no folder can be written; because it
looks at the file of the function alone, not at those of the functions that it calls; because it knows a closure's
functions by numbers that differ between processes; and because it believes a damaged file.

numba is imported by this module, which is therefore imported where a loop is first needed.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any, cast

import llvmlite
import numba
from numba.core import config
from numba.core.caching import _Cache
from numba.core.compiler import CompileResult
from numba.core.dispatcher import Dispatcher
from numba.core.runtime.nrt import rtsys
from numba.core.serialize import dumps
from numba.misc.appdirs import user_cache_dir

_DIGEST = hashlib.blake2b().digest_size


def compiled(function: Callable[..., Any], name: str, parallel: bool = False) -> Callable[..., Any]:
    """Compile ``function`` at its first call, or load what an earlier process compiled; it runs without the GIL.

    Args:
        function: what numba compiles. It may refer to other compiled functions, also by closure; whatever else a
            closure holds must follow from the package's sources and from the processor.
        name: unique in its package. numba's names of machine code are unique in a process only, so two functions
            from one definition, or one compiled in two ways, need names of their own.
        parallel: whether its ``prange`` loops are shared out to threads.
    """
    named = FunctionType(
        cast(FunctionType, function).__code__,
        cast(FunctionType, function).__globals__,
        name,
        closure=cast(FunctionType, function).__closure__,
    )
    named.__qualname__ = name
    made = numba.njit(nogil=True, parallel=parallel)(named)
    if isinstance(made, Dispatcher):  # with NUMBA_DISABLE_JIT it is the function itself
        made._cache = MachineCode(named, parallel)  # type: ignore[attr-defined]
    return cast(Callable[..., Any], made)


def folder() -> Path | None:
    """Where machine code is kept: ``NUMBA_CACHE_DIR`` if set, else the user's own cache; None without a home."""
    given = config.CACHE_DIR  # type: ignore[attr-defined]
    path = Path(Path(given).absolute() if given else user_cache_dir(), "halfstep")  # type: ignore[no-untyped-call]
    return path if path.is_absolute() else None


class MachineCode(_Cache):
    """What numba asks for a function's machine code, and hands it to.

    Args:
        function: whose.
        parallel: whether it is compiled so.
    """

    def __init__(self, function: FunctionType, parallel: bool) -> None:
        self._function, self._parallel = function, parallel

    @property
    def cache_path(self) -> str:
        """The folder, as numba's statistics show it."""
        return str(folder() or "")

    def load_overload(self, sig: Any, target_context: Any) -> CompileResult | None:
        """The code for a signature; None if it was not kept, or is damaged."""
        path = self._path(sig, target_context.codegen())
        try:
            content = path.read_bytes() if path else b""
        except OSError:
            return None
        digest, code = content[:_DIGEST], content[_DIGEST:]
        if not code or hashlib.blake2b(code).digest() != digest:
            return None
        # numba would load all that it can compile first, and scipy with it, which takes most of a second. Ready
        # machine code needs numba's run time only.
        rtsys.initialize(target_context)
        rebuild = cast(Callable[..., CompileResult], CompileResult._rebuild)
        return rebuild(target_context, *pickle.loads(code))

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep the code for a signature, if there is a place for it; the file appears whole or not at all."""
        if data.library.has_dynamic_globals:  # addresses of this process
            return
        if (path := self._path(sig, data.codegen)) is None:
            return
        code = dumps(data._reduce())  # type: ignore[no-untyped-call]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
                try:
                    file.write(hashlib.blake2b(code).digest() + code)
                    file.close()
                    os.replace(file.name, path)
                except BaseException:
                    os.unlink(file.name)
                    raise
        except OSError:
            return  # a read-only home, a full disk: the next process compiles again

    def enable(self) -> None:
        """It always is."""

    def disable(self) -> None:
        """Nothing asks for it: :func:`compiled` decides."""

    def flush(self) -> None:
        """Nothing to do: what is kept goes by content."""

    def _path(self, sig: Any, codegen: Any) -> Path | None:
        """The file of a signature; None where there is no folder, or the sources cannot be read."""
        place, sources = folder(), _sources(Path(self._function.__code__.co_filename).parent)
        if place is None or sources is None:
            return None
        versions = numba.__version__, llvmlite.__version__, sys.version
        package = self._function.__globals__["__name__"].rpartition(".")[0]
        what = (package, self._function.__qualname__, self._parallel, sig, codegen.magic_tuple())
        digest = hashlib.blake2b(repr((versions, what, sources)).encode(), digest_size=16).hexdigest()
        return place / f"{package}.{self._function.__qualname__}-{digest}.bin"


@cache
def _sources(package: Path) -> str | None:
    """A digest of a package's modules; None if there are no files, as in an archive."""
    files = sorted(package.glob("*.py"))
    digest = hashlib.blake2b()
    try:
        for file in files:
            content = file.read_bytes()
            digest.update(f"{file.name} {len(content)} ".encode() + content)
    except OSError:
        return None
    return digest.hexdigest() if files else None
