"""Dropping zeros: the wide and the plain form do the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from halfstep.statistics import kernels
from halfstep.statistics.kernels import WIDTH

NEGATIVE_ZERO = np.float32(-0.0).view(np.int32)


@pytest.fixture(scope="module", params=["plain", "wide"])
def compact(request: pytest.FixtureRequest):
    if request.param == "wide" and not kernels._has_avx512():
        pytest.skip("needs a processor with AVX-512")
    compact = kernels._one_by_one() if request.param == "plain" else kernels._sixteen_at_once()
    compact(np.zeros(1, np.int32), np.zeros(1 + WIDTH, np.int32))  # compiles
    return compact


@given(
    hnp.arrays(
        np.int32,
        st.integers(0, 5 * WIDTH),
        elements=st.sampled_from([0, int(NEGATIVE_ZERO), 1, -1, 7, 2**31 - 1])
        | st.integers(-(2**31), 2**31 - 1),
    )
)
def test_what_is_not_zero_is_kept_in_order(compact, block: np.ndarray) -> None:
    kept = np.empty(block.size + WIDTH, np.int32)
    filled = compact(block, kept)
    wanted = block[(block != 0) & (block != NEGATIVE_ZERO)]
    assert kept[:filled].tolist() == wanted.tolist()


def test_features_follow_numbas_own_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    from numba.core import config

    monkeypatch.setattr(config, "CPU_FEATURES", "")
    assert not kernels._has_avx512()
    monkeypatch.setattr(config, "CPU_FEATURES", "+avx2,+avx512f")
    assert kernels._has_avx512()


def test_arrays_with_gaps_are_refused_by_the_compiler() -> None:
    if not kernels._has_avx512():
        pytest.skip("needs a processor with AVX-512")
    from numba.core.errors import TypingError

    with pytest.raises(TypingError, match="without gaps"):
        kernels._sixteen_at_once()(np.zeros(64, np.int32)[::2], np.zeros(64, np.int32))
