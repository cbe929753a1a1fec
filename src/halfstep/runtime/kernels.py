"""The proof that a file is integer: what the runtime really made of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from halfstep.runtime.file_graph import load
from halfstep.runtime.runtime import Kernels
from halfstep.runtime.runtimes import find_runtime, runtime_of


def inspect_kernels(path: str | Path, threads: int | None = None, runtime: str | None = None) -> Kernels:
    """Load ``path`` on its runtime and read the graph that is executed there.

    Args:
        path: an ONNX file.
        threads: for one operator; None for all cores.
        runtime: which one, by name; None for the one of the target that the file was made for.
        layers: names of the layers and operators; None for those that the nodes' names say.

    Raises:
        ExportError: if the runtime cannot load the file.
    """
    chosen = runtime_of(path) if runtime is None else find_runtime(runtime)
    return chosen.inspect(Path(path), threads)


def layer_times(
    path: str | Path,
    arrays: Sequence[np.ndarray],
    threads: int | None = None,
    runtime: str | None = None,
    layers: Collection[str] | None = None,
) -> dict[str, float]:
    """Microseconds that each layer and operator of a halfstep file takes in a run, by its name in the model.

    What the runtime fused into a layer is in that layer's time. Empty where the runtime's times mean nothing.

    Args:
        path: an ONNX file whose nodes are called ``layer/operator``, as :func:`halfstep.export_onnx` does.
        arrays: one for each input.
        threads: for one operator; None for all cores.
        runtime: which one, by name; None for the one of the target that the file was made for.
        layers: names of the layers and operators; None for those that the nodes' names say.

    Raises:
        ExportError: if the runtime cannot load the file.
    """
    chosen = runtime_of(path) if runtime is None else find_runtime(runtime)
    if chosen.profile is None:
        return {}
    if layers is None:
        layers = {node.name.rpartition("/")[0] for node in load(path, weights=False).graph.node} - {""}
    found: dict[str, float] = {}
    for node, time in chosen.profile(Path(path), threads, arrays).items():
        if layer := layer_of(node, layers):
            found[layer] = found.get(layer, 0.0) + time
    return found


def layer_of(node: str, layers: Collection[str]) -> str:
    """The one of ``layers`` that a node called so, or ``layer/operator``, is of; empty if it is of none.

    Layers' names may have slashes of their own, and a runtime may have appended to the node's.
    """
    if node in layers:  # of a file that was given, whose nodes keep their names
        return node
    name = node
    while "/" in name:
        name = name.rpartition("/")[0]
        if name in layers:
            return name
    return ""


__all__ = ["Kernels", "inspect_kernels", "layer_of", "layer_times"]
