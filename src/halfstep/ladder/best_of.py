"""The options of a sweep, as users ask for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from halfstep.calibrators import MSE, Calibrator, Entropy, Max, Percentile, WeightCalibrator
from halfstep.errors import ArgumentError
from halfstep.fidelity.compare import Measure

#: What is tried where nothing else is asked for: none of them is best everywhere.
CALIBRATORS: tuple[Calibrator, ...] = (
    Max(),
    Percentile(99.9),
    Percentile(99.99),
    Percentile(99.999),
    Percentile(99.9999),
    Entropy(),
    MSE(),
)
WEIGHT_CALIBRATORS: tuple[WeightCalibrator, ...] = (Max(), MSE())
FINALISTS = 3  # candidates that the metric judges at most


@dataclass(frozen=True)
class BestOf:
    """The options of a sweep; made by :func:`best_of`.

    Attributes:
        calibrators: for the activations.
        weights: for the weights.
        by: the measure that ranks, ``"kl"`` or ``"sqnr"``.
        mixed: also try different calibrators at different sites.
        examples: how many of the kept examples are compared on, at most.
        metric: judges the best few; None leaves the last word to the measure.
        finalists: how many of the best it judges.
    """

    calibrators: tuple[Calibrator, ...] = CALIBRATORS
    weights: tuple[WeightCalibrator, ...] = WEIGHT_CALIBRATORS
    by: Measure = "kl"
    mixed: bool = True
    examples: int = 256
    metric: Any = None
    finalists: int = FINALISTS

    def __post_init__(self) -> None:
        for kind, protocol, calibrators in (
            ("calibrators", Calibrator, self.calibrators),
            ("weights", WeightCalibrator, self.weights),
        ):
            if not calibrators:
                raise ArgumentError(f"best_of, {kind}: got none, needed at least one")
            for calibrator in calibrators:
                if not isinstance(calibrator, protocol):
                    raise ArgumentError(
                        f"best_of, {kind}: got {calibrator!r}, needed a {protocol.__name__} such as hs.MSE()"
                    )
        if self.finalists < 1:
            raise ArgumentError(f"best_of, finalists: got {self.finalists}, needed at least 1")


def best_of(
    *calibrators: Calibrator,
    weights: Sequence[WeightCalibrator] = WEIGHT_CALIBRATORS,
    by: Measure = "kl",
    mixed: bool = True,
    examples: int = 256,
    metric: Any = None,
    finalists: int = FINALISTS,
) -> BestOf:
    """Ask for the best of several calibrators: ``calibrate(q, best_of())``.

    All are asked of the same statistics. Each candidate's outputs are compared with the float network's on the
    examples that :func:`~halfstep.observe` kept, and the nearest wins; with a metric the best few are then evaluated,
    and it decides. ``q`` is left with the winner's ranges.

    Args:
        calibrators: for the activations; none stands for :data:`CALIBRATORS`: Max, four percentiles, Entropy, MSE.
        weights: for the weights; the one that does best alone is kept for all candidates.
        by: ``"kl"``, the divergence of the softmax, for classifiers; ``"sqnr"`` for outputs of any kind.
        mixed: also try different calibrators at different sites, as :func:`.influence.influences` proposes them.
        examples: how many of the kept examples are compared on, at most.
        metric: :class:`Accuracy`, :class:`Metric`, or any callable from a model to a float; None for the measure alone.
        finalists: how many of the best it judges.

    Raises:
        ArgumentError: something that is no calibrator, or none for the weights.

    >>> [str(calibrator) for calibrator in best_of(Max(), Percentile(99.9)).calibrators]
    ['max', 'percentile(99.9)']
    """
    return BestOf(tuple(calibrators) or CALIBRATORS, tuple(weights), by, mixed, examples, metric, finalists)
