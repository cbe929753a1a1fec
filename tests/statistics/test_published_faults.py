"""What has gone wrong in published tools' statistics; each test's name is the rule that it broke."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from halfstep.statistics import Histogram, bins, counting
from halfstep.statistics.bins import Tails


def observed(*batches: torch.Tensor) -> Histogram:
    histogram = Histogram()
    for batch in batches:
        histogram.update(batch)
    return histogram


def test_a_tiny_first_batch_then_a_huge_value_costs_neither_memory_nor_counts() -> None:
    histogram = observed(torch.full((100,), 1e-20), torch.tensor([1e30]), torch.full((50,), 1e-20))
    assert histogram.count == 151
    assert histogram.max == pytest.approx(1e30)
    assert histogram.bins()[1].tolist() == [150, 1]


def test_a_first_batch_of_zeros_fixes_nothing() -> None:
    histogram = observed(torch.zeros(1000), torch.linspace(0.0, 1.0, 1001))
    assert (histogram.zero_count, histogram.count, histogram.max) == (1001, 2001, 1.0)
    assert histogram.quantile(0.75) == pytest.approx(0.5, rel=2.0**-7)


def test_one_outlier_costs_the_bulk_no_resolution() -> None:
    bulk = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    alone, together = observed(bulk), observed(bulk, torch.tensor([1e30]))
    assert together.bins()[0][:-1].tolist() == alone.bins()[0].tolist()


def test_growth_of_the_range_never_redistributes_what_was_counted() -> None:
    histogram = Histogram()
    for exponent in range(-30, 31):
        histogram.update(torch.full((7,), 2.0**exponent))
    values, counts = histogram.bins()
    assert values.tolist() == [2.0**exponent for exponent in range(-30, 31)]
    assert set(counts.tolist()) == {7}


def test_counts_go_on_beyond_2_to_the_24() -> None:
    histogram = observed(torch.zeros(()).expand(2**24), torch.zeros(3), torch.full((2**24,), 2.5))
    histogram.update(torch.tensor([2.5]))
    assert histogram.zero_count == 2**24 + 3
    assert histogram.bins()[1].tolist() == [2**24 + 3, 2**24 + 1]
    assert histogram.sum == 2.5 * (2**24 + 1)


def test_counts_and_sums_go_on_beyond_32_bits() -> None:
    histogram = observed(torch.full((3,), 0.1))
    for _ in range(40):  # 3 * 2^40 values
        histogram.merge(histogram)
    assert histogram.count == 3 * 2**40
    assert histogram.sum == 3 * 2**40 * float(np.float32(0.1))


def test_packed_words_are_emptied_before_they_overflow() -> None:
    # A word counts in 24 bits and sums offsets in 40; the largest offset fills the sum fastest.
    bits = np.int32(0x3F80FFFF)
    words = np.full(counting.PIECE, bits)
    counts, offsets = np.zeros(bins.BINS, np.int64), np.zeros(bins.BINS, np.int64)
    counting.count(words, counts, offsets, np.zeros(bins.SPECIALS, np.int64), Tails.empty(), threads=1)
    assert counts[0x3F80] == counting.PIECE
    assert offsets[0x3F80] == counting.PIECE * 0xFFFF


def test_memory_does_not_grow_with_the_data() -> None:
    histogram = Histogram()

    def size() -> int:
        arrays = [value for value in vars(histogram).values() if isinstance(value, np.ndarray)]
        return sum(array.nbytes for array in [*arrays, histogram._tails.ends])

    empty = size()
    for seed in range(20):
        histogram.update(torch.randn(50_000, generator=torch.Generator().manual_seed(seed)))
    assert size() == empty
    assert empty <= 2**20 + 2**13 + 64


def test_no_activation_is_kept() -> None:
    import weakref

    x = torch.randn(1000)
    histogram = observed(x)
    gone = weakref.ref(x)
    del x
    assert gone() is None
    assert histogram.count == 1000


def test_several_threads_fill_histograms_at_once() -> None:
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    expected = observed(*[x] * 5).state_dict()
    histograms = [Histogram() for _ in range(6)]

    def fill(histogram: Histogram) -> None:
        for _ in range(5):
            histogram.update(x)

    threads = [threading.Thread(target=fill, args=(histogram,)) for histogram in histograms]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for histogram in histograms:
        assert all(torch.equal(tensor, expected[name]) for name, tensor in histogram.state_dict().items())


def test_rising_data_whose_every_value_is_a_new_maximum() -> None:
    x = torch.linspace(0.0, 1.0, 100_000)
    histogram = observed(x)
    assert histogram.quantile(0.995) == x[99_499].item()
    assert histogram.max == 1.0
    assert observed(x.flip(0)).quantile(0.005) == x[499].item()


def test_importing_the_package_does_not_import_the_compiler() -> None:
    code = "import sys, halfstep.statistics, halfstep.calibrators; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_can_count_too() -> None:
    code = """
import os, sys, torch
from halfstep.statistics import Histogram
torch.set_num_threads(2)
x = torch.ones(200_000)
histogram = Histogram()
histogram.update(x)
child = os.fork()
histogram.update(x)
if child == 0:
    os._exit(histogram.count != 400_000)
sys.exit(os.waitpid(child, 0)[1] or histogram.count != 400_000)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
