"""Where a run took place."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("halfstep", "torch", "numpy", "onnx", "onnxruntime", "openvino")


def environment() -> dict[str, str]:
    """Versions, processor and threads, by name; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found["system"] = f"{platform.system()} {platform.machine()}"
    found["processor"] = _processor()
    found["instructions"] = torch.backends.cpu.get_cpu_capability()
    found["cores"] = str(os.cpu_count())
    found["torch threads"] = str(torch.get_num_threads())
    if torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name()
    return found


def runtime_identity(runtime: str) -> str:
    """What figures of a file depend on beside the file: halfstep, the runtime's version, and the processor."""
    found = environment()
    return ", ".join(f"{name} {found.get(name, '?')}" for name in ("halfstep", runtime, "processor"))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
