"""The proof that a file is integer: what the runtime really made of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

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


def layer_times(
    path: str | Path, arrays: Sequence[np.ndarray], threads: int | None = None, runtime: str | None = None
) -> dict[str, float]:
    """Microseconds that each layer and operator of a halfstep file takes in a run, by its name in the model.

    What the runtime fused into a layer is in that layer's time. Empty where the runtime's times mean nothing.

    Args:
        path: an ONNX file whose nodes are called ``layer/operator``, as :func:`halfstep.export_onnx` does.
        arrays: one for each input.
        threads: for one operator; None for all cores.
        runtime: which one, by name; None for the one of the target that the file was made for.

    Raises:
        ExportError: if the runtime cannot load the file.
    """
    chosen = runtime_of(path) if runtime is None else find_runtime(runtime)
    if chosen.profile is None:
        return {}
    found: dict[str, float] = {}
    for node, time in chosen.profile(Path(path), threads, arrays).items():
        layer, slash, _ = node.partition("/")
        if slash:
            found[layer] = found.get(layer, 0.0) + time
    return found


__all__ = ["Kernels", "inspect_kernels", "layer_times"]
