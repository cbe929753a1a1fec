"""What the ranks of a run must have in common before rank 0 climbs, and what the others do meanwhile."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfstep.batches import in_pieces
from halfstep.distributed import Crew, keep
from halfstep.errors import RankError
from halfstep.evaluate import DataMetric, Scorer, parts
from halfstep.fidelity.reference import knowing_float
from halfstep.graph.inputs import ModelInputs
from halfstep.identity import Identity
from halfstep.ladder.identity import Examples, labelled_examples
from halfstep.ladder.outcome import Outcome
from halfstep.model import QuantizedModel
from halfstep.runtime.deployed import DeployedModel
from halfstep.runtime.file import module_file
from halfstep.runtime.file import parts as files
from halfstep.snapshot import ModelReplica
from halfstep.training.options import Training


@dataclass(frozen=True)
class Given:
    """What a rank was given, as digests: the same on all of them, or they would not compute parts of one whole.

    Attributes:
        recipe: and target, in words.
        network: of its graph and all that is in it.
        tensors: of each parameter and buffer, by name.
        labelled: of the labelled data, in order; empty where they cannot be seen.
        training: of the training; empty without one.
    """

    recipe: str
    network: str
    tensors: Mapping[str, str]
    labelled: str
    training: str

    @classmethod
    def of(cls, model: QuantizedModel, judged: Examples, training: Training | None) -> Given:
        """What was given to this rank."""
        root = model.captured.module
        tensors = {
            name: Identity(tensor).digest
            for name, tensor in (*root.named_parameters(), *root.named_buffers())
            if not name.startswith("quantizers.")
        }
        labelled = f"{len(judged.seen)} examples, {judged.digest()[:8]}" if judged.seen else ""
        known = "" if training is None else training.identity().digest
        return cls(
            f"{model.recipe!r} for {model.target.name}", model.captured.content, tensors, labelled, known
        )

    def check(self, rank: int, other: Given) -> None:
        """Raise unless ``other``, that of a rank, is the same as this one, rank 0's.

        Raises:
            RankError: naming the rank and the first thing that differs.
        """
        names = [name for name in self.tensors if other.tensors.get(name) != self.tensors[name]]
        names += [name for name in other.tensors if name not in self.tensors]
        if names:
            missing = "" if names[0] in other.tensors else ", which it has not"
            raise RankError(
                f"rank {rank}: its model is another than rank 0's: {len(names)} of {len(self.tensors)} tensors differ, "
                f"the first is {names[0]!r}{missing}; load the same weights on every rank"
            )
        for what, cure in (
            ("recipe", "give every rank the same recipe and target"),
            ("network", "give every rank the same model and example inputs"),
            (
                "labelled",
                "give every rank the same labelled data in the same order (a loader with shuffle=False)",
            ),
            ("training", "give every rank the same training"),
        ):
            mine, its = getattr(self, what), getattr(other, what)
            if mine != its:
                name = {"labelled": "labelled data"}.get(what, what)
                raise RankError(
                    f"rank {rank}: its {name} ({its or 'none'}) is another than rank 0's ({mine}); {cure}"
                )


def agree(
    crew: Crew,
    model: QuantizedModel,
    scorer: Scorer,
    calibration: Iterable[ModelInputs],
    training: Training | None,
    judged: Examples | None = None,
) -> None:
    """See that all ranks were given the same, and let them know each other's by name.

    Args:
        crew: all of them.
        model: this rank's.
        scorer: this rank's, knowing the float model's answers where it compares with them.
        calibration: this rank's.
        training: this rank's.
        judged: the labelled examples, where they are known already.

    Raises:
        RankError: naming a rank that was given something else.
    """
    if crew.ranks is None:
        return
    crew.share("model", model, ModelReplica(model))
    if model.handed_over is not model:
        crew.share("model as handed over", model.handed_over)
    for name, metric in parts(scorer).items():
        crew.share(f"metric {name}", metric)
        if isinstance(metric, DataMetric):
            crew.share(f"data of metric {name}", metric.labelled)
    crew.share("calibration", calibration)
    crew.share("training", training)
    judged = labelled_examples(scorer, model.captured) if judged is None else judged
    given = Given.of(model, judged, training)
    if crew.leads:
        for rank, other in enumerate(crew.everyone.gather(given, "what was given")):
            given.check(rank, other)
    else:
        crew.everyone.gather(given, "what was given")


class _Files:
    """Files as they are sent: read when they are, written to a folder of its own where they are received."""

    def __init__(self, path: Path, modules: Iterable[str]) -> None:
        self.path = path
        self.all = [
            part for each in (path, *(module_file(path, name) for name in modules)) for part in files(each)
        ]

    def __reduce__(self) -> tuple[Any, ...]:
        contents = {str(part.relative_to(self.path.parent)): part.read_bytes() for part in self.all}
        return _received, (self.path.name, contents)


def _received(name: str, contents: Mapping[str, bytes]) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="halfstep-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for part, content in contents.items():
        (folder / part).parent.mkdir(parents=True, exist_ok=True)
        (folder / part).write_bytes(content)
    return folder / name


def hand_out(deployed: DeployedModel, modules: Iterable[str]) -> None:
    """Let every rank of a run have a file that rank 0 runs, where it scores it.

    Args:
        deployed: on rank 0.
        modules: names of those that have files of their own beside it.
    """
    specs = deployed.in_spec, deployed.out_spec, deployed.threads, deployed.runtime
    keep(deployed, _Files(deployed.path, modules), *specs)


def follow(
    crew: Crew,
    model: QuantizedModel,
    scorer: Scorer,
    calibration: Iterable[ModelInputs],
    training: Training | None,
) -> Outcome:
    """What a rank other than 0 does: its share of the work, until rank 0 is done; rank 0's outcome."""
    agree(crew, model, knowing_float(scorer, model), calibration, training)
    try:
        outcome: Outcome = crew.serve()
    finally:
        in_pieces.cache_clear()
    return outcome
