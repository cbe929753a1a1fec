"""Quantization as pure functions of tensors: codes, their real numbers, gradients to train through."""

from halfstep.functional.codes import dequantize, quantize
from halfstep.functional.gradients import CLIPPED_STE, LSQ, PACT, STE, XNOR, Gradient, StraightThrough, Xnor
from halfstep.functional.simulation import fake_quantize

__all__ = [
    "CLIPPED_STE",
    "LSQ",
    "PACT",
    "STE",
    "XNOR",
    "Gradient",
    "StraightThrough",
    "Xnor",
    "dequantize",
    "fake_quantize",
    "quantize",
]
