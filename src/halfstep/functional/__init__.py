"""Quantization as pure functions of tensors: codes, their real numbers, gradients to train through."""

from halfstep.functional.dropping import quantize_some
from halfstep.functional.fake_quantize import (
    CLIPPED_STE,
    LSQ,
    PACT,
    STE,
    XNOR,
    Gradient,
    StraightThrough,
    Xnor,
    fake_quantize,
    fake_quantize_learned,
)
from halfstep.functional.fitting import binary_scale, kmeans_codebook, lloyd_max_codebook, ternary_scale
from halfstep.functional.quantize import dequantize, quantize
from halfstep.functional.uniform import run_time_parameters

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
    "quantize_some",
    "run_time_parameters",
    "ternary_scale",
]
