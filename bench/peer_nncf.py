"""The peer on OpenVINO: nncf.quantize with its defaults, on the OpenVINO model of the float file. Optional."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

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


def quantize_to_target(
    float_path: Path,
    batches: Sequence[ModelInputs],
    labelled: Sequence[tuple[torch.Tensor, torch.Tensor]],
    max_drop: float,
    transformer: bool,
) -> float:
    """quantize_with_accuracy_control on ONNX, judged by ONNX Runtime on all ``labelled`` batches: its share of hits."""
    import nncf
    import onnx
    import onnxruntime

    logging.getLogger("nncf").setLevel(logging.ERROR)
    model = onnx.load(str(float_path))
    name = model.graph.input[0].name

    def hits(
        model: onnx.ModelProto, items: Iterable[tuple[np.ndarray, np.ndarray]]
    ) -> tuple[float, list[float]]:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        found = [session.run(None, {name: inputs})[0].argmax(1) == labels for inputs, labels in items]
        # One value an item of the data, which is a batch: NNCF picks items by them.
        return float(np.concatenate(found).mean()), [float(part.mean()) for part in found]

    pairs = [(inputs.numpy(), labels.numpy()) for inputs, labels in labelled]
    quantized = nncf.quantize_with_accuracy_control(
        model,
        nncf.Dataset([{name: np.ascontiguousarray(tensors_of(batch)[0])} for batch in batches]),
        nncf.Dataset(pairs),
        hits,
        max_drop=max_drop,
        target_device=nncf.TargetDevice.CPU,
        subset_size=len(batches),
        model_type=nncf.ModelType.TRANSFORMER if transformer else None,
    )
    return hits(quantized, pairs)[0]
