"""The runtimes that files can be run on here; this table is where a new one is added."""

from __future__ import annotations

from pathlib import Path

from halfstep.errors import ArgumentError
from halfstep.runtime import tensorrt
from halfstep.runtime.onnxruntime import ONNXRUNTIME
from halfstep.runtime.openvino import OPENVINO
from halfstep.runtime.reference import REFERENCE
from halfstep.runtime.rules import Rule
from halfstep.runtime.runtime import Runtime
from halfstep.runtime.sites import read_metadata
from halfstep.targets import TARGETS

RUNTIMES: dict[str, Runtime] = {runtime.name: runtime for runtime in (ONNXRUNTIME, OPENVINO, REFERENCE)}


#: Rules of the targets that cannot judge a file here, by the target's name.
RULES: dict[str, tuple[Rule, ...]] = {"tensorrt": tensorrt.RULES}


def find_runtime(name: str) -> Runtime:
    """The runtime called ``name``.

    Raises:
        ArgumentError: for an unknown name, listing the known ones.
    """
    if name not in RUNTIMES:
        raise ArgumentError(f"runtime: got {name!r}, needed one of {', '.join(map(repr, RUNTIMES))}")
    return RUNTIMES[name]


def runtime_of(path: str | Path) -> Runtime:
    """The runtime of the target that a file says it was made for; ONNX Runtime for files that say nothing.

    Raises:
        ExportError: if it is no ONNX file.
    """
    target = TARGETS.get(read_metadata(path).get("halfstep.target", ""))
    return find_runtime(target.runtime) if target is not None else ONNXRUNTIME
