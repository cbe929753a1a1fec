"""What would help where the target was missed."""

from __future__ import annotations

from collections.abc import Sequence

from halfstep.evaluate import Score
from halfstep.ladder.rung import Reached
from halfstep.ladder.search import Search

#: Fewer calibration examples than this are worth a word.
FEW = 128


def advise(search: Search, path: Sequence[Reached], deployed: Score) -> tuple[str, ...]:
    """The cheapest next steps first; nothing if the target is met."""
    goal, best = search.asked, search.best
    if goal.met(deployed):
        return ()
    advice = []
    if best is not None and goal.met(best.score):
        advice.append(
            f"The simulation meets the target ({goal.words(best.score)}), the file does not ({goal.words(deployed)}): "
            "a slightly smaller max_drop makes the search keep clear of the edge"
        )
    if note := next((step.note for step in path if step.note), ""):
        cure = "the same call" if note.startswith("it failed") else "a larger budget"
        advice.append(f"The search stopped early, {note}; {cure} goes on from here")
    climbed = {step.rung for step in path}
    if "partial" not in climbed and not note:
        advice.append("Partial quantization was not tried: add 'partial' to rungs")
    if "qat" not in climbed and not note:
        advice.append(
            "Training was not tried: with training=hs.Training(labelled, loss) the last rung wins back most of what "
            "few bits lose"
        )
    bits = [site.format.bits for site in search.model.sites.values()]
    if bits and min(bits) < 7:  # 7 may be a processor's need
        advice.append(f"{min(bits)} bits are few: 8 bits for the side that loses more")
    if 0 < search.calibrated < FEW:
        advice.append(f"{search.calibrated} calibration examples are few; {FEW} or more give steadier ranges")
    for (asked, _), part in zip(goal.each(deployed), goal.standings(deployed), strict=True):
        if part.met:
            continue
        of = f" for {part.metric}" if part.metric else ""
        if goal.strict and part.high is None:
            advice.append(f"A strict target{of} cannot be met without an interval: {part.unsure}")
            continue
        needed = part.high if goal.strict and part.high is not None else part.drop
        target = f"max_drop of {needed:.4g}"
        if asked.target == "floor":
            worst = part.float_score + (-needed if asked.higher_is_better else needed)
            target = f"floor of {worst:.4g}"
        advice.append(f"A {target}{of} would be met by what was found")
    return tuple(advice)
