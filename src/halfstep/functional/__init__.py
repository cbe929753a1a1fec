"""Quantization as pure functions of tensors: codes, their real numbers, gradients to train through."""

from halfstep.functional.codes import dequantize, quantize
from halfstep.functional.dynamic import run_time_parameters
from halfstep.functional.fitting import binary_scale, kmeans_codebook, lloyd_max_codebook, ternary_scale
from halfstep.functional.gradients import CLIPPED_STE, LSQ, PACT, STE, XNOR, Gradient, StraightThrough, Xnor
from halfstep.functional.learned import fake_quantize_learned
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
    "binary_scale",
    "dequantize",
    "fake_quantize",
    "fake_quantize_learned",
    "kmeans_codebook",
    "lloyd_max_codebook",
    "quantize",
    "run_time_parameters",
    "ternary_scale",
]
