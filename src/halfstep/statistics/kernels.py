"""The compiled loops over elements.

A block's zeros are dropped and counted at once. Each other element costs one addition to
one 64-bit word: the upper 24 bits count, the lower 40 add up the offsets within the bin (see :mod:`.bins`). Two tables
of words take turns, so that a run of equal values (the sixes of a ReLU6, a constant) does not wait for its own last
addition.

The kernels are compiled at a user's first call and kept (see :mod:`halfstep.machine_code`).

Dropping the zeros of a block: half of what leaves a ReLU need not be counted one by one.

AVX-512 drops the zeros of sixteen samples with one instruction; elsewhere a loop without branches does it, with the
same result.

Asking for memory before it is read: the next block comes nearer while the present one is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from halfstep.statistics.bins import (
    ENDS,
    FIRST_SPECIAL,
    NAN,
    NEGATIVE_INF,
    POSITIVE_INF,
    SIGN,
    TAIL,
    TINY_NEGATIVE,
    TINY_POSITIVE,
)

LANES = 2  # tables that take turns


OFFERED = 1 << 14  # room for samples that may belong to a tail


_BLOCK = 1 << 11  # elements that the first cache holds while they are compacted, surveyed and counted


_STRETCH = 128  # where a block reaches beyond the tails, only its stretches that do are searched


@dataclass(frozen=True)
class CompiledLoops:
    """Count shares into private tables, in turn or at once, and hand what was counted over to a histogram."""

    one_by_one: Callable[..., None]
    at_once: Callable[..., None]
    hand_over: Callable[..., bool]


@cache
def kernels() -> CompiledLoops:
    """Compile, or load what was compiled before; numba is imported here and not with the package."""
    from numba import njit, prange

    from halfstep.machine_code import compiled

    one = 1 << 40
    sums = one - 1
    magnitudes = 0x7FFFFFFF
    first_special = FIRST_SPECIAL << 16

    compact, prefetch = compaction(), prefetcher()

    @njit(nogil=True)
    def survey(samples: Any) -> Any:
        """Return the largest and smallest sample, as ordered integers, and the least magnitude."""
        high, low, small = np.int32(-0x80000000), np.int32(0x7FFFFFFF), np.int32(0x7FFFFFFF)
        for i in range(samples.size):
            bits = samples[i]
            ordered = np.int32(bits ^ ((bits >> 31) & magnitudes))
            if ordered > high:
                high = ordered
            if ordered < low:
                low = ordered
            magnitude = np.int32(bits & magnitudes)
            if magnitude < small:
                small = magnitude
        return high, low, small

    @njit(nogil=True)
    def count_pair(halves: Any, i: int, even: Any, odd: Any) -> None:
        even[halves[i + 1]] += one + np.int64(halves[i])
        odd[halves[i + 3]] += one + np.int64(halves[i + 2])

    @njit(nogil=True)
    def scatter(samples: Any, table: Any, ahead: Any) -> None:
        """Count finite samples that are not subnormal, while the next block is fetched."""
        # Loads of 16 bits take a sample apart without shifts and masks. The lower half comes first: all processors
        # that numba compiles for are little-endian.
        halves = samples.view(np.uint16)
        even, odd = table[0], table[1]
        # Counting waits for stores and leaves the memory idle: a line for every 8 samples fetches a whole
        # block while half a block is counted, which is what a ReLU leaves.
        fetching = min(halves.size, _BLOCK) // 16 * 16
        for i in range(0, fetching, 16):
            prefetch(ahead, i // 16 * LINE)
            count_pair(halves, i, even, odd)
            count_pair(halves, i + 4, even, odd)
            count_pair(halves, i + 8, even, odd)
            count_pair(halves, i + 12, even, odd)
        rest = halves[fetching:]
        for i in range(0, rest.size // 4 * 4, 4):
            count_pair(rest, i, even, odd)
        if samples.size & 1:
            even[halves[-1]] += one + np.int64(halves[-2])

    @njit(nogil=True)
    def scatter_any(samples: Any, table: Any, specials: Any) -> Any:
        """Count samples that may be NaN, infinite or subnormal; return what :func:`survey` does of the finite."""
        high, low, small = np.int64(-0x80000000), np.int64(0x7FFFFFFF), np.int64(magnitudes)
        for i in range(samples.size):
            bits = np.int64(samples[i])
            magnitude = bits & magnitudes
            if magnitude > first_special:
                specials[NAN] += 1
                continue
            if magnitude == first_special:
                specials[POSITIVE_INF if bits > 0 else NEGATIVE_INF] += 1
                continue
            if magnitude < 0x10000:
                specials[TINY_POSITIVE if bits > 0 else TINY_NEGATIVE] += 1
            table[i & 1, (bits >> 16) & 0xFFFF] += one + (bits & 0xFFFF)
            ordered = bits ^ ((bits >> 31) & magnitudes)
            high, low, small = max(high, ordered), min(low, ordered), min(small, magnitude)
        return np.int32(high), np.int32(low), np.int32(small)

    @njit(nogil=True)
    def gather(samples: Any, least: Any, offered: Any, filled: Any) -> None:
        """Append the finite samples that belong to a tail, as its rows hold them, to what is offered."""
        high, low, _ = survey(samples)
        if high <= least[0] and ~low <= least[1]:
            return
        for i in range(samples.size):
            bits = np.int64(samples[i])
            ordered = bits ^ ((bits >> 31) & magnitudes)
            if (ordered > least[0] or ~ordered > least[1]) and (bits & magnitudes) < first_special:
                if ordered > least[0]:
                    offered[0, filled[0]] = ordered
                    filled[0] += 1
                if ~ordered > least[1]:
                    offered[1, filled[1]] = ~ordered
                    filled[1] += 1

    @njit(nogil=True)
    def offer_zeros(count: int, least: Any, offered: Any, filled: Any) -> None:
        for end in range(ENDS):
            zero = -end  # 0, and its complement
            if zero > least[end]:
                offered[end, filled[end] : filled[end] + count] = zero
                filled[end] += count

    @njit(nogil=True)
    def tally(words: Any, table: Any, span: Any, specials: Any, least: Any, offered: Any, filled: Any) -> int:
        """Count until the end or until no more can be offered; return how many were counted."""
        size: int = words.size
        start, sparse = 0, True
        kept = np.empty(_BLOCK + WIDTH, np.int32)
        while start < size:
            if max(filled[0], filled[1]) + _BLOCK > OFFERED:
                return start
            # Views that start at zero: numba then knows that their indices are not negative.
            block = words[start : start + _BLOCK]
            samples = block
            # Where the block before had zeros this one has, too, and is compacted at once. Else a look tells, which is
            # needed anyway and costs a fraction of compacting.
            if not sparse:
                high, low, small = survey(samples)
            if sparse or small == 0:
                samples = kept[: compact(block, kept)]
                high, low, small = survey(samples)
            sparse = samples.size < block.size
            top = max(np.int64(high), ~np.int64(low))  # the largest magnitude's bits
            if top >= first_special or small < 0x10000:
                high, low, small = scatter_any(samples, table, specials)
                top = max(np.int64(high), ~np.int64(low))
            else:
                scatter(samples, table, words[min(start + _BLOCK, size) :])
            if top >= 0:
                span[0] = min(span[0], np.int64(small) >> 16)
                span[1] = max(span[1], top >> 16)
                span[3] |= low < 0
            if high > least[0] or ~low > least[1]:
                for first in range(0, samples.size, _STRETCH):
                    gather(samples[first : first + _STRETCH], least, offered, filled)
            zeros = block.size - samples.size
            span[2] += zeros
            if zeros:
                offer_zeros(min(zeros, TAIL), least, offered, filled)
            start += block.size
        return size

    @njit(nogil=True)
    def exchange(tail: Any, sample: Any) -> None:
        """Put a sample in the place of a tail's least, which is the root of a heap."""
        place, child = 0, 1
        while child < tail.size:
            if child + 1 < tail.size and tail[child + 1] < tail[child]:
                child += 1
            if sample <= tail[child]:
                break
            tail[place] = tail[child]
            place, child = child, 2 * child + 1
        tail[place] = sample

    @njit(nogil=True)
    def fold(even: Any, odd: Any, counts: Any, offsets: Any) -> None:
        for i in range(counts.size):
            a, b = even[i], odd[i]
            if a | b:
                counts[i] += (a >> 40) + (b >> 40)
                offsets[i] += (a & sums) + (b & sums)
                even[i], odd[i] = 0, 0

    @njit(nogil=True)
    def empty(table: Any, span: Any, specials: Any, counts: Any, offsets: Any, seen: Any) -> None:
        """Move what a share counted to the histogram's counts, offsets and specials."""
        even, odd = table[0], table[1]
        first, last = span[0], span[1]
        for negative in range(1 + span[3]):
            sign = negative * SIGN
            for start, stop in ((sign, sign + 1), (sign + first, sign + last + 1)):
                if start < stop:
                    fold(even[start:stop], odd[start:stop], counts[start:stop], offsets[start:stop])
        counts[0] += span[2]
        seen += specials
        span[0], span[1], span[2], span[3] = SIGN, -1, 0, 0
        specials[:] = 0

    def hand_over(
        size: int,
        ends: Any,
        counts: Any,
        offsets: Any,
        seen: Any,
        reached: Any,
        tables: Any,
        spans: Any,
        specials: Any,
        offered: Any,
        filled: Any,
    ) -> bool:
        """Give the tails what was offered and, where all words are counted, the histogram its counts; say whether."""
        counted = 0
        for share in range(reached.size):
            counted += reached[share]
            for end in range(ENDS):
                tail = ends[end]
                for sample in offered[share, end, : filled[share, end]]:
                    if sample > tail[0]:
                        exchange(tail, sample)
                filled[share, end] = 0
        if counted < size:
            return False
        for share in range(reached.size):
            if reached[share]:
                empty(tables[share], spans[share], specials[share], counts, offsets, seen)
                reached[share] = 0
        return True

    def count(
        words: Any,
        shares: int,
        ends: Any,
        reached: Any,
        tables: Any,
        spans: Any,
        specials: Any,
        offered: Any,
        filled: Any,
    ) -> None:
        """Count each share of the words from where it was left."""
        for i in prange(shares):
            share = words[words.size * i // shares + reached[i] : words.size * (i + 1) // shares]
            reached[i] += tally(share, tables[i], spans[i], specials[i], ends[:, 0], offered[i], filled[i])

    return CompiledLoops(
        compiled(count, "one_by_one"),
        compiled(count, "at_once", parallel=True),
        compiled(hand_over, "hand_over"),
    )


WIDTH = 16  # samples at once, which is also the room needed beyond the block's size

_MAGNITUDE = 0x7FFFFFFF


_COMPRESS = "llvm.x86.avx512.mask.compress.v16i32"


def compaction() -> Callable[..., int]:
    """Compile ``compact(block, kept)``: write the samples that are not zero, of either sign, to the front of ``kept``.

    Both are int32 bits of float32. ``kept`` needs room for ``block.size + WIDTH``; what lies behind the samples kept
    is overwritten. It returns how many these are.
    """
    return _sixteen_at_once() if _has_avx512() else _one_by_one()


def _has_avx512() -> bool:
    """Whether numba compiles for a processor that has it: its own rule, which heeds NUMBA_CPU_FEATURES."""
    from numba.core import codegen, config

    features: str | None = config.CPU_FEATURES  # type: ignore[attr-defined]
    if features is None:
        features = codegen.get_host_cpu_features()  # type: ignore[no-untyped-call]
    return "+avx512f" in features.split(",")


def _one_by_one() -> Callable[..., int]:
    from numba import njit

    @njit(nogil=True)
    def compact(block: Any, kept: Any) -> int:
        filled = 0
        for i in range(block.size):
            kept[filled] = block[i]
            filled += (block[i] & _MAGNITUDE) != 0
        return filled

    return compact


def _sixteen_at_once() -> Callable[..., int]:
    from llvmlite import ir
    from numba import njit, types
    from numba.core import cgutils
    from numba.core.errors import TypingError
    from numba.extending import intrinsic

    @intrinsic
    def compress(_: Any, block: Any, start: Any, kept: Any, filled: Any) -> Any:
        """Compress into a register and store all of it: storing under a mask is slow on some processors."""
        if (block.layout, kept.layout) != ("C", "C"):
            raise TypingError("compress: needs arrays without gaps")

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            word = ir.IntType(32)
            vector, mask = ir.VectorType(word, WIDTH), ir.VectorType(ir.IntType(1), WIDTH)
            source, target = (
                context.make_array(signature.args[which])(context, builder, arguments[which]).data
                for which in (0, 2)
            )

            def address(data: Any, index: Any) -> Any:
                return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())

            samples = builder.load(address(source, arguments[1]), align=4)
            magnitudes = builder.and_(samples, ir.Constant(vector, [_MAGNITUDE] * WIDTH))
            wanted = builder.icmp_unsigned("!=", magnitudes, ir.Constant(vector, [0] * WIDTH))
            function = cgutils.get_or_insert_function(  # type: ignore[no-untyped-call]
                builder.module, ir.FunctionType(vector, [vector, vector, mask]), _COMPRESS
            )
            builder.store(
                builder.call(function, [samples, samples, wanted]), address(target, arguments[3]), align=4
            )
            kept_here = builder.ctpop(builder.bitcast(wanted, ir.IntType(WIDTH)))
            return builder.zext(kept_here, ir.IntType(64))

        return types.int64(block, types.int64, kept, types.int64), generate

    compact_rest = _one_by_one()

    @njit(nogil=True)
    def compact(block: Any, kept: Any) -> int:
        filled = 0
        whole = block.size // WIDTH * WIDTH
        for start in range(0, whole, WIDTH):
            filled += compress(block, start, kept, filled)  # type: ignore[call-arg]
        return filled + compact_rest(block[whole:], kept[filled:])

    return compact


LINE = 16  # int32 words that come at once, on most processors

_PREFETCH = "llvm.prefetch.p0"


_READ, _SECOND_CACHE, _DATA = 0, 2, 1


def prefetcher() -> Callable[..., None]:
    """Compile ``prefetch(words, index)``: have the line of ``words[index]`` fetched; any index is harmless."""
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    @intrinsic
    def prefetch(_: Any, words: Any, index: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            number, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
            data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
            function = cgutils.get_or_insert_function(  # type: ignore[no-untyped-call]
                builder.module, ir.FunctionType(ir.VoidType(), [pointer, number, number, number]), _PREFETCH
            )
            address = builder.bitcast(builder.gep(data, [arguments[1]]), pointer)
            builder.call(function, [address, number(_READ), number(_SECOND_CACHE), number(_DATA)])
            return context.get_dummy_value()

        return types.void(words, types.int64), generate

    return prefetch
