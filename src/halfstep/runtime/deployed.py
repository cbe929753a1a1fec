"""An exported file on the runtime of its target: run like a module, and asked which kernels it runs on.

The runtimes that files can be run on here; this table is where a new one is added.

The proof that a file is integer: what the runtime really made of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from halfstep.errors import ArgumentError, DataError, RefusedError
from halfstep.graph.inputs import Outputs
from halfstep.graph.pipeline import ModulePart
from halfstep.runtime import lint
from halfstep.runtime.file import module_file, read_metadata
from halfstep.runtime.file_graph import load
from halfstep.runtime.lint import REFERENCE, Rule
from halfstep.runtime.onnxruntime import ONNXRUNTIME
from halfstep.runtime.openvino import OPENVINO
from halfstep.runtime.runtime import Kernels, Runtime
from halfstep.targets import TARGETS

RUNTIMES: dict[str, Runtime] = {runtime.name: runtime for runtime in (ONNXRUNTIME, OPENVINO, REFERENCE)}


#: Rules of the targets that cannot judge a file here, by the target's name.
RULES: dict[str, tuple[Rule, ...]] = {"tensorrt": lint.RULES}


def find_runtime(name: str) -> Runtime:
    """The runtime called ``name``.

    Raises:
        ArgumentError: for an unknown name, listing the known ones.
    """
    if name not in RUNTIMES:
        raise ArgumentError(f"runtime: got {name!r}, needed one of {', '.join(map(repr, RUNTIMES))}")
    return RUNTIMES[name]


def runtime_of(path: str | Path) -> Runtime:
    """The runtime of the target that a file says it was made for; ONNX Runtime for files that say nothing.

    Raises:
        ExportError: if it is no ONNX file.
    """
    target = TARGETS.get(read_metadata(path).get("halfstep.target", ""))
    return find_runtime(target.runtime) if target is not None else ONNXRUNTIME


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


class DeployedModel(nn.Module):
    """A module that answers with the exported file: takes what the user's model takes, returns what it returns.

    Floating-point inputs of another type are cast to the file's, float32 in all that halfstep exports; outputs are as
    the file gives them.

    Code that was written for the user's model finds what it asks a model for: ``eval()`` and ``train()``, which change
    nothing, ``to()`` and ``device``, where outputs are handed over, and a parameter there, which is nothing else.

    Args:
        path: the ONNX file.
        in_spec: how ``(args, kwargs)`` flatten to the file's inputs; None for positional tensors.
        out_spec: how its outputs are put together (``captured.out_spec``); None for one tensor or a tuple.
        threads: for one operator; None for all cores.
        runtime: which one, by name; None for the one of the target that the file was made for.

    Raises:
        ExportError: if the runtime cannot load the file, with its words.
    """

    def __init__(
        self,
        path: str | Path,
        in_spec: pytree.TreeSpec | None = None,
        out_spec: Outputs | None = None,
        threads: int | None = None,
        runtime: str | None = None,
    ) -> None:
        super().__init__()
        self.path, self.in_spec, self.out_spec = Path(path), in_spec, out_spec
        self.threads, self.runtime = threads, runtime
        chosen = runtime_of(path) if runtime is None else find_runtime(runtime)
        self.session = chosen.open(self.path, threads)
        self.inputs = self.session.inputs
        self.place = nn.Parameter(torch.zeros(()), requires_grad=False)

    @property
    def device(self) -> torch.device:
        """Where outputs are handed over; the file is run on the CPU."""
        return self.place.device

    def modules_alone(self, parts: Mapping[str, ModulePart]) -> dict[str, Callable[..., Any]]:
        """The modules of a dict, by name, each answering with its own file beside this one.

        Args:
            parts: what each has of the network (``captured.parts``).

        Raises:
            ExportError: if a file is missing, or the runtime cannot load it.
        """
        return {
            name: DeployedModel(
                module_file(self.path, name), part.in_spec, part.out_spec, self.threads, self.runtime
            )
            for name, part in parts.items()
        }

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the file.

        Raises:
            DataError: if there are more or fewer tensors than the file has inputs.
            RefusedError: if the runtime fails on them, with its words.
        """
        leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if len(leaves) != len(self.inputs):
            raise DataError(
                f"{self.path.name}: got {len(leaves)} tensors, needed {len(self.inputs)}: {', '.join(self.inputs)}"
            )
        given = zip(leaves, self.session.types, strict=True)
        try:
            arrays = self.session.run([to_numpy(leaf, dtype) for leaf, dtype in given])
        except Exception as error:  # the runtimes' own errors share no base
            sizes = ", ".join(
                f"{name} {tuple(leaf.shape)}" for name, leaf in zip(self.inputs, leaves, strict=True)
            )
            words = " ".join(str(error).split())
            raise RefusedError(f"{self.path.name}: the runtime cannot run it on {sizes}: {words}") from error
        outputs = [torch.from_numpy(array).to(self.device) for array in arrays]
        if self.out_spec is not None:
            return self.out_spec.restore(outputs)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


def to_numpy(tensor: torch.Tensor, dtype: np.dtype | None = None) -> np.ndarray:
    """A contiguous array on the CPU, sharing memory where it can.

    Args:
        tensor: of any type that numpy has; where ``dtype`` is a floating-point one, of any floating-point type.
        dtype: that floats are cast to; None leaves them.
    """
    tensor = tensor.detach().cpu()
    if dtype is not None and tensor.is_floating_point() and np.issubdtype(dtype, np.floating):
        tensor = tensor.to(getattr(torch, dtype.name))
    return np.asarray(tensor.numpy(), order="C")
