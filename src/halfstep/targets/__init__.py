"""One small file per runtime; this table is where a new one is added."""

from halfstep.errors import ArgumentError
from halfstep.targets.onnxruntime import ONNXRUNTIME
from halfstep.targets.openvino import OPENVINO
from halfstep.targets.target import Kernel, Lowering, Target
from halfstep.targets.tensorrt import TENSORRT

TARGETS: dict[str, Target] = {target.name: target for target in (ONNXRUNTIME, OPENVINO, TENSORRT)}


def find_target(name: str | Target) -> Target:
    """The target called ``name``.

    Raises:
        ArgumentError: for an unknown name, listing the known ones.
    """
    if isinstance(name, Target):
        return name
    if name not in TARGETS:
        raise ArgumentError(f"target: got {name!r}, needed one of {', '.join(map(repr, TARGETS))}")
    return TARGETS[name]


__all__ = ["TARGETS", "Kernel", "Lowering", "Target", "find_target"]
