"""Where a run takes place: versions, processor, memory."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from halfstep.cores import available_cores

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
    found["cores"] = str(available_cores())
    found["torch threads"] = str(torch.get_num_threads())
    if torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name()
    return found


def runtime_identity(runtime: str) -> str:
    """What figures of a file depend on beside the file: halfstep, the runtime's version, and the processor."""
    found = environment()
    return ", ".join(f"{name} {found.get(name, '?')}" for name in ("halfstep", runtime, "processor"))


def machine() -> dict[str, str]:
    """What a latency depends on: runtimes, what writes their files, processor and cores, by name."""
    of_latency = ("halfstep", "onnxruntime", "openvino", "system", "processor", "cores")
    return {name: value for name, value in environment().items() if name in of_latency}


def free_memory() -> int:
    """Bytes that this process can still take, as far as the system and its container tell; else a very large number."""
    free = [_fields("/proc/meminfo").get("MemAvailable:", sys.maxsize // 1024) * 1024]
    group = Path("/sys/fs/cgroup")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            numbers = [int((group / name).read_text()) for name in (limit, used)]
        except (OSError, ValueError):  # another kind of container, or "max": none
            continue
        cache = _fields(str((group / used).with_name("memory.stat"))).get("inactive_file", 0)
        free.append(numbers[0] - numbers[1] + cache)
    return max(0, min(free))


def _fields(path: str) -> dict[str, int]:
    """The first number of each line, by the line's first word; nothing where there is no such file."""
    try:
        lines = [line.split() for line in Path(path).read_text().splitlines()]
    except OSError:
        return {}
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
