"""The peer: onnxruntime.quantization.quantize_static as its users are told to call it on x86."""

from __future__ import annotations

import contextlib
import io
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from halfstep.graph.inputs import ModelInputs, tensors_of


def quantize_static(
    float_path: Path,
    batches: Sequence[ModelInputs],
    out: Path,
    method: str = "MinMax",
    weights: int = 8,
) -> Path:
    """QDQ, u8 activations, s8 or s4 weights per channel, after quant_pre_process."""
    import onnx
    from onnxruntime import quantization as q
    from onnxruntime.quantization.shape_inference import quant_pre_process

    logging.disable(logging.WARNING)
    float_path, out = float_path.resolve(), out.resolve()
    prepared = out.with_suffix(".prepared.onnx")
    with contextlib.chdir(out.parent):  # where symbolic shape inference fails, it leaves a file behind
        try:
            quant_pre_process(str(float_path), str(prepared))
        except Exception:  # on sizes that vary; its documents then have symbolic shapes left out
            quant_pre_process(str(float_path), str(prepared), skip_symbolic_shape=True)
    names = [value.name for value in onnx.load(str(prepared), load_external_data=False).graph.input]

    class Reader(q.CalibrationDataReader):
        def __init__(self) -> None:
            self.items = iter(
                {name: np.ascontiguousarray(t) for name, t in zip(names, tensors_of(b), strict=True)}
                for b in batches
            )

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.items, None)

    q.quantize_static(
        str(prepared),
        str(out),
        Reader(),
        quant_format=q.QuantFormat.QDQ,
        per_channel=True,
        activation_type=q.QuantType.QUInt8,
        weight_type=q.QuantType.QInt8 if weights == 8 else q.QuantType.QInt4,
        calibrate_method=getattr(q.CalibrationMethod, method),
    )
    logging.disable(logging.NOTSET)
    return out


def quantize_dynamic(float_path: Path, out: Path, per_channel: bool = False) -> Path:
    """Weights in 8 bits, activations with ranges at run time; after quant_pre_process."""
    from onnxruntime import quantization as q
    from onnxruntime.quantization.shape_inference import quant_pre_process

    logging.disable(logging.WARNING)
    prepared = out.with_suffix(".prepared.onnx")
    quant_pre_process(str(float_path), str(prepared), skip_symbolic_shape=True)  # it fails on an Expand
    q.quantize_dynamic(str(prepared), str(out), per_channel=per_channel, weight_type=q.QuantType.QInt8)
    logging.disable(logging.NOTSET)
    return out


def calibrate_only(
    float_path: Path, batches: Sequence[ModelInputs], methods: Sequence[str], folder: Path
) -> dict[str, float]:
    """Seconds of a float pass of its own, and of each method's collecting and computing; model loading not counted."""
    import onnxruntime
    from onnxruntime import quantization as q
    from onnxruntime.quantization.calibrate import create_calibrator

    session = onnxruntime.InferenceSession(str(float_path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    feeds = [{name: np.ascontiguousarray(tensors_of(batch)[0].numpy())} for batch in batches]
    for feed in feeds[:1]:
        session.run(None, feed)
    start = time.perf_counter()
    for feed in feeds:
        session.run(None, feed)
    times = {"onnxruntime, float": time.perf_counter() - start}
    for method in methods:

        class Reader(q.CalibrationDataReader):
            def __init__(self) -> None:
                self.items = iter(feeds)

            def get_next(self) -> dict[str, np.ndarray] | None:
                return next(self.items, None)

        calibrator = create_calibrator(
            str(float_path),
            augmented_model_path=str(folder / f"{method}.onnx"),
            calibrate_method=getattr(q.CalibrationMethod, method),
        )
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            calibrator.collect_data(Reader())
            calibrator.compute_data()
        times[f"onnxruntime, {method}"] = time.perf_counter() - start
    return times
