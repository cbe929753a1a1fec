"""An exported file, run on ONNX Runtime, behind the face of a module."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from halfstep.errors import DataError, ExportError


def open_session(path: str | Path, threads: int | None = None, optimized: str | Path | None = None) -> Any:
    """An ONNX Runtime session on the CPU.

    Args:
        path: an ONNX file.
        threads: for one operator; None for all cores.
        optimized: where to write the graph that the runtime really executes, None for nowhere.

    Raises:
        ExportError: if the runtime cannot load the file, with its words.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or os.cpu_count() or 1
    options.inter_op_num_threads = 1
    # Idle threads that spin would take the cores from the next session in this process, and from torch.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = (
        3  # the runtime warns that an optimised graph is for this machine: it is meant to be
    )
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"onnxruntime cannot load {path}: {error}") from error


class DeployedModel(nn.Module):
    """A module that answers with the exported file: takes what the user's model takes, returns what it returns.

    Args:
        path: the ONNX file.
        in_spec: how ``(args, kwargs)`` flatten to the file's inputs; None for positional tensors.
        out_spec: how its outputs are put together; None for one tensor or a tuple.
        threads: for one operator; None for all cores.
    """

    def __init__(
        self,
        path: str | Path,
        in_spec: pytree.TreeSpec | None = None,
        out_spec: pytree.TreeSpec | None = None,
        threads: int | None = None,
    ) -> None:
        super().__init__()
        self.path, self.in_spec, self.out_spec = Path(path), in_spec, out_spec
        self.session = open_session(path, threads)
        self.inputs = [value.name for value in self.session.get_inputs()]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the file; tensors come back on the CPU."""
        leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if len(leaves) != len(self.inputs):
            raise DataError(
                f"{self.path.name}: got {len(leaves)} tensors, needed {len(self.inputs)}: {', '.join(self.inputs)}"
            )
        feed = {name: to_numpy(leaf) for name, leaf in zip(self.inputs, leaves, strict=True)}
        outputs = [torch.from_numpy(np.asarray(array)) for array in self.session.run(None, feed)]
        if self.out_spec is not None:
            return pytree.tree_unflatten(outputs, self.out_spec)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A contiguous array on the CPU, sharing memory where it can."""
    return np.asarray(tensor.detach().cpu().numpy(), order="C")
