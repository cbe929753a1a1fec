"""The proof that a file is integer: what the runtime really made of it."""

from __future__ import annotations

from pathlib import Path

from halfstep.runtime.runtime import Kernels
from halfstep.runtime.runtimes import find_runtime, runtime_of


def inspect_kernels(path: str | Path, threads: int | None = None, runtime: str | None = None) -> Kernels:
    """Load ``path`` on its runtime and read the graph that is executed there.

    Args:
        path: an ONNX file.
        threads: for one operator; None for all cores.
        runtime: which one, by name; None for the one of the target that the file was made for.

    Raises:
        ExportError: if the runtime cannot load the file.
    """
    chosen = runtime_of(path) if runtime is None else find_runtime(runtime)
    return chosen.inspect(Path(path), threads)


__all__ = ["Kernels", "inspect_kernels"]
