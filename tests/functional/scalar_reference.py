"""Quantization of one number at a time, as slow and as plain as it can be: the oracle of the fast functions."""

import bisect
import math

import numpy as np

from halfstep.formats import Codebook, Floating, Integer
from halfstep.granularity import PerChannel, PerGroup


def owner(index, granularity):
    """The index of the parameter that the element at ``index`` uses."""
    match granularity:
        case PerChannel(axis):
            return (index[axis],)
        case PerGroup(axis, size):
            axis %= len(index)
            return (*index[:axis], index[axis] // size, *index[axis + 1 :])
    return ()


def code(x, scale, zero_point, format, table):
    """The code of ``x`` (float32 or float64), which also is the type that is computed in."""
    kind = type(x)
    with np.errstate(all="ignore"):
        u = x / kind(scale)
    match format:
        case Integer():
            z = format.fixed_zero_point if format.symmetric else zero_point
            if math.isnan(u):
                return z
            if format.mid_rise:
                q = np.floor(u) + z
            elif format.round_shifted and not format.symmetric:
                q = np.rint(u + kind(z))
            else:
                q = np.rint(u) + z
            return int(min(max(q, format.quant_min), format.quant_max))
        case Codebook():
            u = x if not format.scaled else u
            u = kind(0) if math.isnan(u) else u
            thresholds = format.thresholds[table].tolist()
            return (bisect.bisect_right if format.ties_up else bisect.bisect_left)(thresholds, float(u))
        case Floating():
            if math.isnan(u):
                return 0x7F if format.storage else 0
            finite = [c for c in range(format.levels // 2) if 0 <= number(c, format) <= format.largest]
            a = min(abs(float(u)), format.largest)
            best = min(
                finite, key=lambda c: (abs(number(c, format) - a), c % 2)
            )  # a tie goes to the even pattern
            return best + (format.levels // 2 if math.copysign(1, u + 0.0) < 0 else 0)


def number(pattern, format):
    """The number of a bit pattern of a floating format, by the definition."""
    sign = -1 if pattern >= format.levels // 2 else 1
    magnitude = pattern % (format.levels // 2)
    field, mantissa = divmod(magnitude, 2**format.mantissa_bits)
    bias = 2 ** (format.exponent_bits - 1) - 1
    fraction = mantissa / 2**format.mantissa_bits
    return sign * (math.ldexp(1 + fraction, field - bias) if field else math.ldexp(fraction, 1 - bias))


def value(code, scale, zero_point, format, table, kind):
    """The real number of a code, computed in ``kind``."""
    match format:
        case Integer():
            z = format.fixed_zero_point if format.symmetric else zero_point
            return kind(code - z + (0.5 if format.mid_rise else 0)) * kind(scale)
        case Codebook():
            return kind(format.values[table][code].item()) * kind(scale if format.scaled else 1)
        case Floating():
            if format.storage and code == 0x7F:
                return kind(np.nan)
            return kind(number(code, format)) * kind(scale)
