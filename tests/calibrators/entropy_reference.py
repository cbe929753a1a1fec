"""The divergence as its definition reads: a loop over candidates, bins and levels. Slow, and easy to check."""

from __future__ import annotations

import math
from collections import defaultdict

import torch

from halfstep.formats import Integer


def divergence(values: list[float], counts: list[int], low: float, high: float, format: Integer) -> float:
    """Return KL(P || Q) in nats, for bins given by their means and counts; none of them is zero."""
    scale, zero_point = (
        parameter.item() for parameter in format.parameters(torch.tensor(low), torch.tensor(high))
    )
    inside = [i for i, x in enumerate(values) if low <= x <= high]
    p = {i: float(counts[i]) for i in inside}
    for x, count in zip(values, counts, strict=True):  # what is clipped joins the outermost bin on its side
        if x < low:
            p[inside[0]] += count
        elif x > high:
            p[inside[-1]] += count

    members = defaultdict(list)
    for i in inside:
        code = min(max(round(values[i] / scale) + zero_point, format.quant_min), format.quant_max)
        members[code].append(i)
    q = {}
    for level in members.values():
        mass, width = sum(counts[i] for i in level), sum(bin_width(values[i]) for i in level)
        for i in level:
            q[i] = mass * bin_width(values[i]) / width

    total_p, total_q = math.fsum(p.values()), math.fsum(q.values())
    return math.fsum(p[i] / total_p * math.log(p[i] / total_p / (q[i] / total_q)) for i in inside)


def bin_width(x: float) -> float:
    return 2.0 ** (math.floor(math.log2(abs(x))) - 7)
