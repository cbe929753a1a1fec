"""Rung 1, post-training quantization: every calibrator on the same statistics."""

from __future__ import annotations

from collections.abc import Sequence

from halfstep.calibrators import Calibrator, Max
from halfstep.evaluate import Score
from halfstep.ladder.calibration import calibrate
from halfstep.ladder.search import Search

CALIBRATORS: tuple[Calibrator, ...] = (Max(),)


def climb_ptq(search: Search, calibrators: Sequence[Calibrator] = CALIBRATORS) -> Score:
    """Try every calibrator, leave the model with the best one's ranges, and return its score."""
    scores: list[tuple[Calibrator, Score]] = []
    for calibrator in calibrators:
        calibrate(search.model, calibrator)
        scores.append((calibrator, search.evaluate(f"PTQ, {calibrator}")))
    best, score = min(scores, key=lambda pair: search.goal.drop(pair[1]))
    calibrate(search.model, best)
    search.decide(
        f"PTQ with {best} scores {score.value:.4f}, {search.goal.drop(score):+.4f} below float "
        f"(allowed {search.goal.max_drop:g})"
    )
    return score
