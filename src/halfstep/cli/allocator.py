"""Keeping freed memory, in processes that are our own."""

from __future__ import annotations

import ctypes
import sys

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_THRESHOLD = 1 << 30  # bytes


def keep_freed_memory() -> None:
    """Let glibc reuse the memory of freed tensors, for the rest of the process, where it would give it back.

    Large tensors come and go at every layer. By default much of what they free goes back to the system, which clears
    every page again at its next use: up to a third of the time of a small network's pass. The price is that the
    process stays as large as it was at its largest, which is why no library should decide it for its user.

    Does nothing where there is no glibc.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _THRESHOLD)
