"""The rungs by name; this table is where a new one is added."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace

from halfstep.errors import ArgumentError
from halfstep.ladder.mixed_bits import MixedBits
from halfstep.ladder.partial import Partial
from halfstep.ladder.ptq import PTQ
from halfstep.ladder.qat import QAT
from halfstep.ladder.rung import Rung
from halfstep.training.options import Training

#: The rungs that have short forms, from the bottom.
RUNGS: dict[str, type[PTQ | Partial | QAT]] = {kind.name: kind for kind in (PTQ, Partial, QAT)}


def find_rungs(
    rungs: Sequence[str | Rung],
    training: Training | None = None,
    partial: Partial | None = None,
    max_float: float | None = None,
) -> list[Rung]:
    """The rungs to climb, from the bottom: those given by name with the options given beside them.

    The first one is always post-training quantization: it gives the ranges that every other one starts from.

    Raises:
        ArgumentError: for an unknown name, with the nearest known one, if there are none, the first is missing, they
            come in another order or twice, or options are given for a rung that has its own.
    """
    short: dict[str, Rung] = {
        "ptq": PTQ(),
        "partial": partial or Partial(),
        "qat": QAT(training),
        "mixed_bits": MixedBits(),
    }
    if max_float is not None:
        short["partial"] = replace(partial or Partial(), max_float=max_float)
    wanted = f"needed some of {', '.join(map(repr, short))}, or a hs.Rung"
    found: list[Rung] = []
    for rung in rungs:
        if not isinstance(rung, Rung) and rung not in short:
            near = difflib.get_close_matches(str(rung).lower(), short, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ArgumentError(f"rungs: got {rung!r}, {wanted}{hint}")
        found.append(rung if isinstance(rung, Rung) else short[rung])
    if not found:
        raise ArgumentError(f"rungs: got none, {wanted}")
    own = ((QAT, "training", training), (Partial, "partial", partial), (Partial, "max_float", max_float))
    for kind, option, given in own:
        if given is not None and any(isinstance(rung, kind) for rung in rungs):
            raise ArgumentError(
                f"{option}: given beside a rung that has its own, hs.{kind.__name__}(...): give one"
            )
    names = [rung.name for rung in found]
    asked, lowest = ", ".join(map(repr, names)), next(iter(RUNGS))
    ordered = [name for name in RUNGS if name in names or name == lowest]
    give = f"give rungs={ordered} (--rungs {','.join(ordered)})"
    if lowest not in names:
        raise ArgumentError(
            f"rungs: got {asked}, needed {lowest!r} first: the others start from the ranges that it finds; {give}"
        )
    known = [name for name in names if name in RUNGS]
    if names[0] != lowest or known != ordered or len({*names}) < len(names):
        raise ArgumentError(f"rungs: got {asked}, needed each once and from the bottom up; {give}")
    return found
