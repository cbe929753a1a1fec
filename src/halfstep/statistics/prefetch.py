"""Asking for memory before it is read: the next block comes nearer while the present one is counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
