"""Processes that compute with fewer instructions than this machine has: their sums differ in the last bits."""

from __future__ import annotations

import torch

#: For torch's own kernels, oneDNN and MKL, by the set that torch uses without them.
_NARROWER = {
    "AVX512": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "AVX2": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
}


def narrower() -> dict[str, str]:
    """Variables of the environment under which a process takes the next narrower set; empty where none is known."""
    return _NARROWER.get(torch.backends.cpu.get_cpu_capability(), {})
