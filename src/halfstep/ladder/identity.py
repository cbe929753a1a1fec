"""What a run is about and where it takes place: claimed when a directory is first used, compared when it goes on.

Where a run takes place: versions, processor, memory.

What examples themselves give to doubt: used twice, or too few.
"""

from __future__ import annotations

import hashlib
import platform
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from halfstep.cores import available_cores
from halfstep.errors import RunError
from halfstep.evaluate import CallableMetric, DataMetric, Scorer, labelled_data, parts
from halfstep.graph.captured import Captured
from halfstep.graph.inputs import ModelInputs, batch_size, call_arguments
from halfstep.identity import Identity, rows_of_bytes, state_of
from halfstep.journal import Journal
from halfstep.ladder.goal import GoalSpec
from halfstep.model import QuantizedModel
from halfstep.training.options import Training

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


#: Why the very same code may be refused: counters and caches are content too.
_HINT = (
    "It is known by its code, defaults, closure and attributes; a class leaves what makes no difference out of what "
    "its __getstate__ returns"
)


class Examples:
    """The digests of examples, collected as batches pass.

    Args:
        captured: the network that takes them, which says where the batch is; None where it is first.

    Attributes:
        seen: a digest for each example's inputs, in order.
        unknown: what could not be read, by where it was found.
    """

    def __init__(self, captured: Captured | None = None) -> None:
        self._captured = captured
        self.seen: list[bytes] = []
        self.unknown: list[str] = []
        self._labelled: list[bytes] = []
        self._others: list[str] = []

    def add(self, inputs: ModelInputs, labels: Any = None) -> None:
        """Take in a batch; labels may be of any type.

        Raises:
            DataError: if there is no tensor whose first dimension is the batch.
        """
        leaves = pytree.tree_leaves(call_arguments(inputs))
        count = batch_size(inputs)
        if self._captured is not None and any(self._captured.batch_axes):
            count = self._captured.batch_size(inputs)
            leaves = [
                leaf.movedim(axis, 0) if axis else leaf
                for leaf, axis in zip(leaves, self._captured.batch_axes, strict=True)
            ]
        rows, rest = _by_example(leaves, count)
        own, others = _by_example([] if labels is None else pytree.tree_leaves(labels), count)
        self.seen += rows
        self._labelled += [_hash(a + b) for a, b in zip(rows, own, strict=True)]
        if others or rest:
            identity = Identity(len(self.seen), rest, others)
            self._others.append(identity.digest)
            self.unknown = list(dict.fromkeys([*self.unknown, *identity.unknown]))

    def digest(self) -> str:
        """Of all examples with their labels in order, however they are cut into batches."""
        return self._of(self._labelled)

    def contents(self) -> str:
        """Of all examples with their labels, in whatever order they came."""
        return self._of(sorted(self._labelled))

    def _of(self, rows: Sequence[bytes]) -> str:
        return _hash(b"".join(rows) + " ".join(self._others).encode()).hex()


@dataclass(frozen=True)
class Claimed:
    """What came of :func:`claim_run`.

    Attributes:
        judged: the examples that the metric judges on, where they can be seen.
        unseen: what the metric depends on and cannot be compared with an earlier run's, in words; empty if all can.
        unseen_in_training: the same of the training.
    """

    judged: Examples
    unseen: tuple[str, ...]
    unseen_in_training: tuple[str, ...] = ()


def claim_run(
    journal: Journal,
    prepared: QuantizedModel,
    scorer: Scorer,
    aim: GoalSpec,
    training: Training | None = None,
) -> Claimed:
    """Make the directory this run's own, or see that it is.

    Raises:
        RunError: if the directory belongs to a run with another model, recipe, target, metric, data or training, or
            was written by another version of halfstep.
    """
    if journal.resumed and not journal.claimed("version of halfstep"):
        raise RunError(
            f"directory {journal.folder} was written by an earlier halfstep, whose results cannot be compared; choose "
            "another directory, or begin anew in this one with fresh=True (--fresh)"
        )
    packages = environment()
    journal.claim("version of halfstep", packages.get("halfstep", "unknown"), words=True)
    journal.claim("model", prepared.captured.content)
    journal.claim("recipe", repr(prepared.recipe))
    asked = f"target {prepared.target.name}, {aim}, confidence {aim.confidence:g}"
    if prepared.padding is not None:
        mask = prepared.padding.mask
        asked += f", padding {mask if isinstance(mask, str) else Identity(mask).digest[:8]}"
    if prepared.autocast is not None:
        asked += f", calibrated in {str(prepared.autocast).removeprefix('torch.')}"
    journal.claim("configuration", asked, words=True)
    identities = {name: _metric_identity(part) for name, part in parts(scorer).items()}
    together = Identity({name: each.digest for name, each in identities.items()}).digest
    journal.claim("metric", together, hint=_HINT)
    unseen = [f"{name} {what}".lstrip() for name, each in identities.items() for what in each.unknown]
    unseen += [
        f"metric {name!r}" if name else "the metric, a function that reads what it wants"
        for name, part in parts(scorer).items()
        if not isinstance(part, DataMetric)
    ]
    surroundings = [each.surroundings for each in identities.values()]
    if journal.changed("surroundings", digests=surroundings):
        unseen.append("global variables that the metric's code refers to, which are not what they were")
    judged = labelled_examples(scorer, prepared.captured)
    if judged.seen:
        _claim_examples(journal, judged)
    unseen += [f"labelled data {what}" for what in judged.unknown]
    unseen_in_training: list[str] = []
    if training is not None:
        identity = training.identity()
        journal.claim("training", identity.digest, hint=_HINT)
        unseen_in_training = identity.unknown
        if journal.changed("training surroundings", digest=identity.surroundings):
            warnings.warn(
                "training: global variables that its code refers to are not what they were when this run began; what "
                "was trained rests on the old ones; begin anew with fresh=True (--fresh) if they matter",
                stacklevel=4,
            )
    journal.write("environment", packages=packages)
    return Claimed(judged, tuple(unseen), tuple(unseen_in_training))


def _metric_identity(scorer: Scorer) -> Identity:
    """A metric without its data, which are claimed by themselves."""
    if isinstance(scorer, CallableMetric):
        return Identity(scorer.function, scorer.higher_is_better)
    state = state_of(scorer)
    if isinstance(state, dict):
        state = {
            name: value
            for name, value in state.items()
            if name != "labelled"
            and not (isinstance(value, MethodType) and value.__self__ is scorer)  # the class's
        }
    return Identity(type(scorer), state)


def labelled_examples(scorer: Scorer, captured: Captured) -> Examples:
    """The examples that the metrics judge on, where they can be seen."""
    judged = Examples(captured)
    for batches in labelled_data(scorer):
        for item in batches:
            if isinstance(item, (tuple, list)) and len(item) == 2:  # anything else is the metric's to refuse
                judged.add(*item)
    return judged


def _claim_examples(journal: Journal, judged: Examples) -> None:
    """The examples, and their order where scores of single examples were kept by position.

    Raises:
        RunError: if they are others, or come in another order.
    """
    journal.claim("labelled data", judged.contents())
    order = [entry.data["digest"] for entry in journal.of("order")]
    paired = [entry.data["paired"] for entry in journal.of("paired")]
    if order and order[-1] != judged.digest() and paired != [False]:
        raise RunError(
            f"directory {journal.folder} belongs to a run with the same labelled examples in another order, and scores "
            "were kept by position; give them in the same order each time (a loader with shuffle=False, sorted file "
            "names), choose another directory, or begin anew in this one with fresh=True (--fresh)"
        )
    if not order:
        journal.write("order", digest=judged.digest())


def _by_example(leaves: Sequence[Any], count: int) -> tuple[list[bytes], list[Any]]:
    """A digest for each of ``count`` examples, and the leaves that cannot be divided among them."""
    rest = []
    digests = [hashlib.blake2b(digest_size=16) for _ in range(count)]
    for leaf in leaves:
        numbers = isinstance(leaf, torch.Tensor) or (
            isinstance(leaf, np.ndarray) and not leaf.dtype.hasobject
        )
        if not (numbers and leaf.ndim and len(leaf) == count):
            rest.append(leaf)
            continue
        head = f"{leaf.dtype} {tuple(leaf.shape[1:])} ".encode()
        for digest, row in zip(digests, rows_of_bytes(leaf), strict=True):
            digest.update(head)
            digest.update(row.data)
    return [digest.digest() for digest in digests], rest


def _hash(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


#: Ranges of fewer calibration examples than this change with every other choice of them.
FEW = 32


def data_warnings(calibration: Examples, judged: Examples) -> list[str]:
    """A sentence for each reason not to believe a score on these data.

    Args:
        calibration: what the ranges come from.
        judged: what the metric scores on; empty where that cannot be seen.
    """
    found = []
    known = set(judged.seen)
    both = sum(example in known for example in calibration.seen)
    if both:
        found.append(
            f"{both:,} of {len(calibration.seen):,} calibration examples are also among the {len(judged.seen):,} that "
            "the metric judges on: scores may flatter; calibrate on others"
        )
    if len(calibration.seen) < FEW:
        found.append(
            f"{len(calibration.seen)} calibration examples are few: other examples would give other ranges; "
            f"{FEW} at least, several hundred better"
        )
    repeated = len(calibration.seen) - len(set(calibration.seen))
    if repeated > len(calibration.seen) // 2:
        found.append(
            f"{repeated:,} of {len(calibration.seen):,} calibration examples are repetitions of others"
        )
    return found
