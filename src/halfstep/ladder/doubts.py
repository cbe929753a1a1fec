"""What examples themselves give to doubt: used twice, or too few."""

from __future__ import annotations

from halfstep.ladder.identity import Examples

#: Ranges of fewer calibration examples than this change with every other choice of them.
FEW = 32


def doubts(calibration: Examples, judged: Examples) -> list[str]:
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
