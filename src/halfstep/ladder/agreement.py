"""Kendall's tau: how far two scores agree on an order."""

from __future__ import annotations

import math
from collections.abc import Sequence


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Kendall's tau-b: pairs that both put in the same order less those that they do not, over all; ties corrected.

    1 for the same order, -1 for the opposite one, about 0 for unrelated ones; NaN where one of them is constant or
    there are fewer than two.

    >>> round(kendall_tau([1, 2, 3, 4], [1, 2, 4, 3]), 4)  # (5 - 1) / 6
    0.6667

    Source: Kendall, Biometrika 33 (1945).
    """
    balance = one = two = 0
    for i in range(len(first)):
        for j in range(i):
            a = (first[i] > first[j]) - (first[i] < first[j])
            b = (second[i] > second[j]) - (second[i] < second[j])
            balance, one, two = balance + a * b, one + a * a, two + b * b
    return balance / math.sqrt(one * two) if one and two else math.nan
