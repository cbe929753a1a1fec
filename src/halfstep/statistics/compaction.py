"""Dropping the zeros of a block: half of what leaves a ReLU need not be counted one by one.

AVX-512 drops the zeros of sixteen samples with one instruction; elsewhere a loop without branches does it, with the
same result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
