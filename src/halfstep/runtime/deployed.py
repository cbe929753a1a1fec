"""An exported file, run on the runtime of its target, behind the face of a module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from halfstep.errors import DataError
from halfstep.graph.inputs import Outputs
from halfstep.runtime.runtimes import find_runtime, runtime_of


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
        chosen = runtime_of(path) if runtime is None else find_runtime(runtime)
        self.session = chosen.open(self.path, threads)
        self.inputs = self.session.inputs
        self.place = nn.Parameter(torch.zeros(()), requires_grad=False)

    @property
    def device(self) -> torch.device:
        """Where outputs are handed over; the file is run on the CPU."""
        return self.place.device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the file.

        Raises:
            DataError: if there are more or fewer tensors than the file has inputs.
        """
        leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if len(leaves) != len(self.inputs):
            raise DataError(
                f"{self.path.name}: got {len(leaves)} tensors, needed {len(self.inputs)}: {', '.join(self.inputs)}"
            )
        given = zip(leaves, self.session.types, strict=True)
        arrays = self.session.run([to_numpy(leaf, dtype) for leaf, dtype in given])
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
