"""From a configuration to the objects that it names."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, dtype, nn
from torch.utils._pytree import tree_structure

from halfstep.cli.config import Config, RecipePart, make_config, read_config, to_yaml
from halfstep.cli.sources import ONNX, check_input, find_callable, load_inputs, load_labelled, load_model
from halfstep.errors import ArgumentError, DataError, HalfstepError, RunError, named
from halfstep.evaluate import SQNR, Accuracy, AgainstFloat, Agreement, Cosine, Metric, Scorer
from halfstep.files import write_whole
from halfstep.granularity import PerTensor
from halfstep.graph.float32 import in_float32, other_types
from halfstep.graph.inputs import batch_size
from halfstep.journal import Entry, Journal, Saved
from halfstep.model import QuantizedModel
from halfstep.progress import Budget
from halfstep.recipe import Recipe
from halfstep.targets import find_target
from halfstep.training.entry import Forward
from halfstep.training.options import Loss, Training

#: A run's own copy of what it was told.
CONFIG = "config.yaml"


#: Metrics that compare with the float model and need no labels, by their words.
UNLABELLED: dict[str, Callable[[Iterable[Any]], AgainstFloat]] = {
    "agreement": Agreement,
    "cosine": Cosine,
    "sqnr": SQNR,
}

#: How each kind of recipe is made.
_RECIPES: dict[str, Callable[[RecipePart], Recipe]] = {
    "static": lambda part: Recipe.uniform(
        part.weights, part.activations, PerTensor() if part.per_tensor else None, portable=part.portable
    ),
    "dynamic": lambda part: Recipe.dynamic(part.weights or 8, part.group, part.portable),
    "weight_only": lambda part: Recipe.weight_only(part.weights or 4, part.group),
}


@dataclass(frozen=True)
class Job:
    """What a configuration names, loaded.

    Attributes:
        config: itself.
        model: the float network.
        calibration: batches of inputs, which can be iterated again and again.
        example: the first of them, which the model is captured with.
    """

    config: Config
    model: nn.Module
    calibration: Iterable[Any]
    example: Any

    @classmethod
    def load(cls, config: Config) -> Job:
        """Import the model and read the calibration data.

        Raises:
            HalfstepError: naming what cannot be found or read.
        """
        weights = None if config.weights is None else Path(config.weights)
        is_file = config.model.endswith(ONNX)  # which is held to its runtime on the example
        model = None if is_file else load_model(config.model, weights)
        inputs = load_inputs(config.calibration, config.batch, config.examples)
        source = f"calibration {config.calibration!r}"
        example = next(iter(inputs), None)
        if example is None:
            raise DataError(f"{source}: got no batch, needed at least one")
        with named(source):
            size = batch_size(example)
        if size < 2 and not is_file:  # whose example is repeated
            raise DataError(
                f"{source}: got a first batch of {size}, needed 2 examples to capture the network with"
            )
        if model is None:
            model = load_model(config.model, weights, example)
        check_input(model, example, source)
        return cls(config, model, inputs, example)

    def metrics(self) -> dict[str, Scorer]:
        """The metrics over the labelled data by name; one that is alone has the name ``""``.

        Where none of them needs labels the data may be without.

        Raises:
            HalfstepError: naming what cannot be found or read.
        """
        asked, ways = self.config.metric, self.config.higher_is_better
        specs = asked if isinstance(asked, dict) else {"": asked}
        higher = ways if isinstance(ways, dict) else dict.fromkeys(specs, ways)
        if unknown := set(higher) - set(specs):
            raise ArgumentError(
                f"higher_is_better: got the name {min(unknown)!r}, needed true or false"
                + (f" for {', '.join(map(repr, specs))}" if isinstance(asked, dict) else "")
            )
        makers = {name: _maker(spec, higher.get(name, True)) for name, spec in specs.items()}
        labelled: Iterable[Any] = ()
        if set(specs.values()) <= set(UNLABELLED):
            inputs = self._inputs(self.config.labelled)
        else:
            labelled = self._labelled(self.config.labelled, "labelled")
            inputs = _without_labels(labelled)
        return {
            name: make(inputs if specs[name] in UNLABELLED else labelled) for name, make in makers.items()
        }

    @property
    def classifies(self) -> bool:
        """Whether an accuracy or agreement is asked for, so that outputs are logits."""
        asked = self.config.metric
        return not {"accuracy", "agreement"}.isdisjoint(
            asked.values() if isinstance(asked, dict) else (asked,)
        )

    def recipe(self) -> Recipe:
        """What to quantize, and how."""
        part = self.config.recipe
        recipe = _RECIPES[part.kind](part)
        for pattern in part.float_layers:
            recipe = recipe.override(pattern, None)
        return recipe

    def training(self) -> Training | None:
        """The fine-tuning, if one is asked for."""
        part = self.config.training
        if part is None:
            return None
        known: dict[str | None, Loss | None] = {"cross_entropy": nn.functional.cross_entropy, None: None}
        loss = (
            known[part.loss]
            if part.loss in known
            else find_callable(str(part.loss), "cross_entropy, or package.module:loss")
        )
        forward: Forward | None = part.forward
        if part.forward is not None and ":" in part.forward:
            forward = find_callable(part.forward, "a method's name, or package.module:function")
        return Training(
            self._labelled(part.data, "training data"),
            loss,
            epochs=part.epochs,
            learning_rate=part.learning_rate,
            forward=forward,
            outputs=part.outputs,
            seed=part.seed,
        )

    def _labelled(self, name: str, what: str) -> Iterable[Any]:
        """Labelled batches, of inputs as the calibration data are."""
        found = load_labelled(name, self.config.batch)
        if name.endswith(".npz"):
            self._check(next(iter(found))[0], name, what)
        return found

    def _inputs(self, name: str) -> Iterable[Any]:
        """Batches of inputs to judge on, with the labels left out where there are some.

        The calibration data show what inputs are, so that a pair (inputs, labels) is known.
        """
        found = load_inputs(name, self.config.batch, None)
        first = next(iter(found), None)
        if name.endswith(".npz"):
            self._check(first, name, "labelled")
        kind = tree_structure(self.example)
        if tree_structure(first) != kind and isinstance(first, (tuple, list)) and len(first) == 2:
            return _without_labels(found) if tree_structure(first[0]) == kind else found
        return found

    def _check(self, inputs: Any, name: str, what: str) -> None:
        """See that a file's inputs are what the model takes, before anything is run.

        A model that is not in float32 takes floats in either type.
        """
        if isinstance(self.example, Tensor) and self._type_of(inputs) is not self._type_of(self.example):
            raise DataError(
                f"{what} {name!r}: got inputs of {inputs.dtype}, needed {self.example.dtype}, as the calibration "
                "data have"
            )
        check_input(self.model, inputs, f"{what} {name!r}")

    def _type_of(self, inputs: Tensor) -> dtype:
        """The type that inputs are computed in."""
        return in_float32(inputs[:0], other_types(self.model)).dtype

    def budget(self) -> Budget:
        """What the search may cost."""
        return Budget(self.config.budget.evaluations, self.config.budget.minutes)

    def keep(self, path: Path) -> None:
        """Write the configuration, every default resolved, where :func:`find_config` finds it.

        Raises:
            RunError: if it cannot be written.
        """
        write_whole(path, to_yaml(self.config.model_dump()).encode())

    def prepare(self, entries: Iterable[Entry] = ()) -> QuantizedModel:
        """The model with its sites, not observed; the recipe settled as in the run with these entries."""
        from halfstep.ladder.prepare import prepare, settle

        recipe = settle(self.recipe(), find_target(self.config.target), entries)
        config = self.config
        return prepare(
            self.model,
            self.example,
            recipe,
            config.target,
            dynamic=config.dynamic,
            padding=config.padding,
            float_from=config.float_from,
            states=config.states,
        )

    def observed(self) -> QuantizedModel:
        """The model with its sites, after one pass over the calibration data."""
        from halfstep.calibration.calibrate import observe

        model = self.prepare()
        observe(model, self.calibration)
        return model


def _without_labels(labelled: Iterable[Any]) -> Iterable[Any]:
    """The inputs of labelled batches; of a list as a list, whose examples can be picked."""
    pairs = isinstance(labelled, list) and all(isinstance(item, (tuple, list)) for item in labelled)
    return [item[0] for item in labelled] if pairs else _FirstOfPairs(labelled)


class _FirstOfPairs:
    """The same of what is iterated anew each time."""

    def __init__(self, labelled: Iterable[Any]) -> None:
        self._labelled = labelled

    def __iter__(self) -> Iterator[Any]:
        for item in self._labelled:
            yield item[0]


def _maker(spec: str, higher_is_better: bool) -> Callable[[Iterable[Any]], Scorer]:
    """From data to the metric that a word or name stands for."""
    if spec == "accuracy":
        return Accuracy
    if spec in UNLABELLED:
        return UNLABELLED[spec]
    score: Callable[..., Any] = find_callable(
        spec, "accuracy, agreement, cosine, sqnr, or package.module:score"
    )
    return lambda labelled: Metric(labelled, score, higher_is_better)


def find_config(source: Path) -> Config:
    """The configuration in a YAML file, or the one that a run's directory keeps.

    Raises:
        ArgumentError: if there is none, or it has a mistake.
    """
    return read_config(source / CONFIG if source.is_dir() else source)


def config_from(source: str, flags: dict[str, Any], recipe: dict[str, Any], budget: dict[str, Any]) -> Config:
    """The configuration that a YAML file and flags make together, flags last.

    A flag for another kind of recipe than the file's takes the place of the file's bits and groups, which are of that
    kind; layers that stay in float do so in any.

    Args:
        source: a ``.yaml`` file, or what names a model.
        flags: those that were given; None stands for not given.
        recipe: the same for keys of the recipe.
        budget: the same for keys of the budget.

    Raises:
        ArgumentError: naming the line of the file, or the key, that is wrong.
    """
    changes = _given(flags)
    if source.endswith((".yaml", ".yml")):
        config = read_config(source)
        for name, part in (("recipe", recipe), ("budget", budget)):
            if flags_of_part := _given(part):
                old = getattr(config, name).model_dump(exclude_unset=True)
                if flags_of_part.get("kind", config.recipe.kind) != config.recipe.kind:
                    old = {key: value for key, value in old.items() if key == "float_layers"}
                changes[name] = {**old, **flags_of_part}
        return make_config({**config.model_dump(exclude_unset=True), **changes}, "command line")
    parts = {"recipe": _given(recipe), "budget": _given(budget)}
    return make_config({"model": source, **changes, **parts}, "command line")


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if value is not None}


def restore(run: Path, rung: str | None) -> tuple[QuantizedModel, dict[str, Any], Job]:
    """The network of a run's outcome, or the best of a rung, from the run's own configuration and checkpoint.

    The calibration data are read for a sample of inputs.

    Args:
        run: the run's directory.
        rung: whose best to take. None for the outcome's; of a run that has none yet, for the last finished rung's.

    Returns:
        The network; its record, with ``what`` it is, its ``score`` and its ``rung``; and what it was made from.

    Raises:
        RunError: if the run has no such rung, or its checkpoint is missing, damaged or another network's.
        ArgumentError: if the run was not made by ``halfstep quantize``.
    """
    from halfstep.calibration.calibrate import SAMPLE_EXAMPLES
    from halfstep.graph.layer_precision import LayerPrecision
    from halfstep.journal import read
    from halfstep.ladder.checkpoints import Checkpoints
    from halfstep.snapshot import Snapshot

    entries = read(run)
    record, saved = _kept(run, entries, rung)
    job = Job.load(find_config(run))
    model = job.prepare(entries)
    sample = itertools.islice(job.calibration, max(1, SAMPLE_EXAMPLES // job.config.batch))
    precision = LayerPrecision.of_dict(record["put_back"])
    try:
        state = Checkpoints(Journal(), model).network(saved)
        restored = Snapshot(model, precision, state).restore()
        strangers = sorted(set(state) ^ set(restored.state_dict()))
    except (HalfstepError, RuntimeError) as error:
        strangers = [str(error).strip().splitlines()[-1].strip()]
    if strangers:
        raise RunError(
            f"{run}: its checkpoint is not of the network that {job.config.model!r} returns now: {strangers[0]}"
        )
    restored.sample = list(sample)
    return restored, record, job


def _kept(run: Path, entries: list[Entry], rung: str | None) -> tuple[dict[str, Any], Saved]:
    """The record of what is to be restored, and its checkpoint."""
    from halfstep.journal import read_checkpoint
    from halfstep.ladder.deploy import OUTCOME

    ends = [entry.data for entry in entries if entry.kind == OUTCOME and "key" in entry.data]
    if ends and rung is None:
        return ends[-1], read_checkpoint(run, entries, OUTCOME, ends[-1]["key"])
    steps = [entry.data for entry in entries if entry.kind == "step" and rung in (None, entry.data["rung"])]
    if not steps:
        finished = dict.fromkeys(entry.data["rung"] for entry in entries if entry.kind == "step")
        known = ", ".join(map(repr, finished)) or "none"
        raise RunError(f"{run}: has no finished rung{f' {rung!r}' if rung else ''}; finished are {known}")
    return steps[-1], read_checkpoint(run, entries, steps[-1]["rung"], steps[-1].get("key", ""))
