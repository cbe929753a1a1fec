"""From a configuration to the objects that it names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from halfstep.config import Config, RecipePart, make_config, read_config
from halfstep.errors import ArgumentError, DataError, RunError
from halfstep.evaluate import Accuracy, Metric
from halfstep.files import write_whole
from halfstep.granularity import PerTensor
from halfstep.ladder.budget import Budget
from halfstep.model import QuantizedModel
from halfstep.recipe import Recipe
from halfstep.sources import find_callable, load_inputs, load_labelled, load_model
from halfstep.training.options import Loss, Training

#: A run's own copy of what it was told.
CONFIG = "config.yaml"


#: How each kind of recipe is made.
_RECIPES: dict[str, Callable[[RecipePart], Recipe]] = {
    "static": lambda part: Recipe.uniform(
        part.weights, part.activations, PerTensor() if part.per_tensor else None
    ),
    "dynamic": lambda part: Recipe.dynamic(part.weights or 8, part.group),
    "weight_only": lambda part: Recipe.weight_only(part.weights or 4, part.group),
}


@dataclass(frozen=True)
class Job:
    """What a configuration names, loaded.

    Attributes:
        config: itself.
        model: the float network.
        calibration: batches of inputs; the first one is the example that the model is captured with.
    """

    config: Config
    model: nn.Module
    calibration: list[Any]

    @classmethod
    def load(cls, config: Config) -> Job:
        """Import the model and read the calibration data.

        Raises:
            HalfstepError: naming what cannot be found or read.
        """
        weights = None if config.weights is None else Path(config.weights)
        model = load_model(config.model, weights)
        inputs = load_inputs(config.calibration, config.batch, config.examples)
        if not inputs:
            raise DataError(f"calibration {config.calibration!r}: got no batch, needed at least one")
        return cls(config, model, inputs)

    def metrics(self) -> dict[str, Metric]:
        """The metrics over the labelled data by name; one that is alone has the name ``""``.

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
        labelled = load_labelled(self.config.labelled, self.config.batch)
        return {name: _metric(spec, labelled, higher.get(name, True)) for name, spec in specs.items()}

    @property
    def classifies(self) -> bool:
        """Whether an accuracy is asked for, so that outputs are logits."""
        asked = self.config.metric
        return "accuracy" in (asked.values() if isinstance(asked, dict) else (asked,))

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
        loss = known[part.loss] if part.loss in known else find_callable(str(part.loss))
        labelled = load_labelled(part.data, self.config.batch)
        return Training(labelled, loss, epochs=part.epochs, learning_rate=part.learning_rate, seed=part.seed)

    def budget(self) -> Budget:
        """What the search may cost."""
        return Budget(self.config.budget.evaluations, self.config.budget.minutes)

    def keep(self, path: Path) -> None:
        """Write the configuration, every default resolved, where :func:`find_config` finds it.

        Raises:
            RunError: if it cannot be written.
        """
        write_whole(path, yaml.safe_dump(self.config.model_dump(), sort_keys=False).encode())

    def prepare(self) -> QuantizedModel:
        """The model with its sites, not observed."""
        from halfstep.ladder.climb import prepare

        return prepare(self.model, self.calibration[0], self.recipe(), self.config.target)

    def observed(self) -> QuantizedModel:
        """The model with its sites, after one pass over the calibration data."""
        from halfstep.ladder.calibration import observe

        model = self.prepare()
        observe(model, self.calibration)
        return model


def _metric(spec: str, labelled: list[Any], higher_is_better: bool) -> Metric:
    if spec == "accuracy":
        return Accuracy(labelled)
    score: Callable[..., Any] = find_callable(spec)
    return Metric(labelled, score, higher_is_better)


def find_config(source: Path) -> Config:
    """The configuration in a YAML file, or the one that a run's directory keeps.

    Raises:
        ArgumentError: if there is none, or it has a mistake.
    """
    return read_config(source / CONFIG if source.is_dir() else source)


def config_from(source: str, flags: dict[str, Any], recipe: dict[str, Any], budget: dict[str, Any]) -> Config:
    """The configuration that a YAML file and flags make together, flags last.

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
            if _given(part):
                changes[name] = {**getattr(config, name).model_dump(exclude_unset=True), **_given(part)}
        return make_config({**config.model_dump(exclude_unset=True), **changes}, "command line")
    parts = {"recipe": _given(recipe), "budget": _given(budget)}
    return make_config({"model": source, **changes, **parts}, "command line")


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if value is not None}


def restore(run: Path, rung: str | None) -> tuple[QuantizedModel, dict[str, Any]]:
    """The best candidate of a run's rung, from the run's own configuration and checkpoint, and the rung's record.

    The calibration data are read for a sample of inputs.

    Raises:
        RunError: if the run has no such rung, or its checkpoint is missing or damaged.
        ArgumentError: if the run was not made by ``halfstep quantize``.
    """
    from halfstep.ladder.calibration import SAMPLE_EXAMPLES
    from halfstep.ladder.journal import read, read_checkpoint
    from halfstep.ladder.snapshot import Snapshot

    entries = read(run)
    steps = {entry.data["rung"]: entry.data for entry in entries if entry.kind == "step"}
    if not steps or (rung is not None and rung not in steps):
        known = ", ".join(map(repr, steps)) or "none"
        raise RunError(f"{run}: has no finished rung {rung or ''!r}; finished are {known}")
    step = steps[rung] if rung is not None else list(steps.values())[-1]
    job = Job.load(find_config(run))
    model = job.prepare()
    model.sample = job.calibration[: max(1, SAMPLE_EXAMPLES // job.config.batch)]
    state = read_checkpoint(run, entries, step["rung"])
    return Snapshot(
        model, {name: frozenset(layers) for name, layers in step["put_back"].items()}, state
    ).restore(), step
