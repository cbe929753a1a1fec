"""Building and saving ONNX models; everything here needs onnx, so it is imported when a file is asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import onnx
import onnx_ir as ir
import torch

from halfstep.errors import RefusedError
from halfstep.export.editing import drop_unused, share_equal, unique_names
from halfstep.export.lower import lower, pool_globally, rename
from halfstep.export.marks import DOMAIN
from halfstep.export.original import Original
from halfstep.export.trace import trace
from halfstep.model import QuantizedModel
from halfstep.runtime.file_graph import LARGEST_MESSAGE, OURS


def build_quantized(model: QuantizedModel, metadata: Mapping[str, str]) -> ir.Model:
    """The network with QuantizeLinear/DequantizeLinear at its sites, and what is worth knowing as metadata.

    What was read from a file is written into its graph, which keeps its names, metadata and version.
    """
    if (original := Original.of(model)) is not None:
        onnx_model = original.marked()
        lower(onnx_model, model)
        original.finish()
    else:
        onnx_model = trace(model, quantized=True)
        rename(onnx_model.graph)
        lower(onnx_model, model)
        share_equal(onnx_model.graph)
        onnx_model.producer_name, onnx_model.producer_version = OURS, version("halfstep")
        onnx_model.metadata_props.clear()
    unique_names(onnx_model.graph)
    onnx_model.opset_imports.pop(DOMAIN, None)
    onnx_model.metadata_props.update(
        {
            "halfstep.version": version("halfstep"),
            "halfstep.torch": torch.__version__,
            "halfstep.target": model.target.name,
            "halfstep.recipe": repr(model.recipe),
            **{f"halfstep.{name}": ", ".join(layers) for name, layers in model.precision.to_dict().items()},
            **{f"halfstep.{key}": value for key, value in metadata.items()},
        }
    )
    return onnx_model


def build_float(model: QuantizedModel) -> ir.Model:
    """The float network; of what was read from a file its graph, with the parameters as they are now."""
    if (original := Original.of(model)) is not None:
        onnx_model = original.floating()
        original.finish()
    else:
        onnx_model = trace(model, quantized=False)
        rename(onnx_model.graph)
        pool_globally(onnx_model.graph)
        drop_unused(onnx_model.graph)
        share_equal(onnx_model.graph)
    unique_names(onnx_model.graph)
    return onnx_model


def save(onnx_model: ir.Model, path: Path) -> None:
    """Write the file and let onnx's checker look at it.

    Raises:
        RefusedError: if the checker refuses it, in the checker's words.
    """
    tensors = [value.const_value for value in onnx_model.graph.initializers.values()]
    size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    weights = None
    if size > LARGEST_MESSAGE:  # called after their content, so that no other file can mean them by accident
        digest = hashlib.blake2b(digest_size=8)
        for tensor in tensors:
            if tensor is not None:
                digest.update(f"{tensor.name} {tensor.dtype} {tensor.shape}".encode())
                digest.update(tensor.tobytes())
        weights = f"{path.name}.{digest.hexdigest()}.data"
    else:
        ir.external_data.load_to_model(onnx_model)  # what lay beside the file that the network was read from
    ir.save(onnx_model, path, external_data=weights)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise RefusedError(f"onnx's checker refuses the file: {error}") from error
