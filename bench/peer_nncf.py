"""The peer on OpenVINO: nncf.quantize with its defaults, on the OpenVINO model of the float file. Optional."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from halfstep.graph.inputs import ModelInputs, tensors_of


def available() -> bool:
    return find_spec("nncf") is not None


def quantize(float_path: Path, batches: Sequence[ModelInputs], out: Path, transformer: bool) -> Path:
    """Post-training quantization, target device CPU; ``model_type`` is set for transformers, as its users are told."""
    import nncf
    import openvino

    logging.getLogger("nncf").setLevel(logging.ERROR)
    model = openvino.Core().read_model(str(float_path))
    items = [[np.ascontiguousarray(t) for t in tensors_of(batch)] for batch in batches]
    quantized = nncf.quantize(
        model,
        nncf.Dataset(items),
        target_device=nncf.TargetDevice.CPU,
        subset_size=len(items),
        model_type=nncf.ModelType.TRANSFORMER if transformer else None,
    )
    openvino.save_model(quantized, str(out), compress_to_fp16=False)
    return out
