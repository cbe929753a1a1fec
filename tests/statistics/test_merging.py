"""Any order, any grouping, any split over processes: the same state, bit for bit."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from halfstep.errors import ArgumentError, DataError
from halfstep.statistics import Histogram


def same(a: Histogram, b: Histogram) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def observed(*batches: torch.Tensor) -> Histogram:
    histogram = Histogram()
    for batch in batches:
        histogram.update(batch)
    return histogram


def awkward(generator: torch.Generator, size: int) -> torch.Tensor:
    """Zeros of both signs, ties, outliers, subnormals, NaN and infinities among normal numbers."""
    x = torch.randn(size, generator=generator)
    kind = torch.randint(0, 40, (size,), generator=generator)
    for where, value in enumerate((0.0, -0.0, 6.0, 1e30, -1e-44, math.nan, math.inf, -math.inf)):
        x[kind == where] = value
    return x


def test_200_random_splits_over_two_shards_equal_one_pass() -> None:
    generator = torch.Generator().manual_seed(0)
    x = awkward(generator, 6000)
    whole = observed(x)
    for _ in range(200):
        shuffled = x[torch.randperm(x.numel(), generator=generator)]
        cut = int(torch.randint(0, x.numel() + 1, (), generator=generator))
        sizes = torch.randint(1, 2000, (8,), generator=generator).tolist()
        first = observed(*shuffled[:cut].split(sizes[0]))
        first.merge(observed(*shuffled[cut:].split(sizes[1])))
        assert same(first, whole)


@settings(deadline=None)
@given(st.lists(st.lists(st.floats(width=32), max_size=20), max_size=6), st.randoms())
def test_merging_is_commutative_and_associative(batches: list[list[float]], random) -> None:
    shards = [observed(torch.tensor(batch)) for batch in batches]
    shuffled = random.sample(shards, len(shards))
    left, right = Histogram(), Histogram()
    for shard in shards:
        left.merge(shard)
    for shard in shuffled:
        middle = copy.deepcopy(shard)
        middle.merge(right)
        right = middle
    assert same(left, right)
    assert same(left, observed(*(torch.tensor(batch) for batch in batches)))


def test_derived_numbers_are_equal_bit_for_bit_too() -> None:
    x = awkward(torch.Generator().manual_seed(1), 50_000)
    a, b = observed(x), observed(*x.flip(0).split(777))
    assert (a.sum, a.sum_of_squares, a.quantile(0.3)) == (b.sum, b.sum_of_squares, b.quantile(0.3))
    assert all((left == right).all() for left, right in zip(a.slabs(), b.slabs(), strict=True))


def test_the_number_of_threads_does_not_matter() -> None:
    x = awkward(torch.Generator().manual_seed(2), 300_000)
    before = torch.get_num_threads()
    try:
        histograms = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            histograms.append(observed(x))
    finally:
        torch.set_num_threads(before)
    assert same(histograms[0], histograms[1])
    assert same(histograms[0], histograms[2])


def test_merging_leaves_the_other_alone_and_the_empty_one_is_neutral() -> None:
    a, b = observed(torch.tensor([1.0, 2.0])), observed(torch.tensor([3.0]))
    kept = copy.deepcopy(b)
    a.merge(b)
    assert same(b, kept)
    a.merge(Histogram())
    assert same(a, observed(torch.tensor([3.0, 2.0, 1.0])))


def test_asking_does_not_change_what_is_asked() -> None:
    histogram = observed(awkward(torch.Generator().manual_seed(3), 5000))
    kept = copy.deepcopy(histogram)
    for ask in ("min", "max", "sum", "sum_of_squares", "bins", "slabs", "keyed_counts", "state_dict"):
        answer = getattr(histogram, ask)
        if callable(answer):
            answer()
    histogram.quantile(0.2)
    histogram.magnitude_quantile(0.9)
    values, counts = histogram.bins()
    values[:], counts[:] = 0, 0
    for tensor in histogram.state_dict().values():
        tensor.zero_()
    assert same(histogram, kept)


def test_state_survives_safetensors() -> None:
    histogram = observed(awkward(torch.Generator().manual_seed(4), 5000))
    restored = Histogram()
    restored.update(torch.ones(3))  # replaced, not added to
    restored.load_state_dict(load(save(histogram.state_dict())))
    assert same(histogram, restored)
    restored.update(torch.tensor([5.5]))
    histogram.update(torch.tensor([5.5]))
    assert same(histogram, restored)


def test_batch_ranges_travel_along() -> None:
    a, b = Histogram(batch_ranges=True), Histogram(batch_ranges=True)
    a.update(torch.tensor([1.0]))
    b.update(torch.tensor([2.0, 3.0]))
    a.merge(b)
    restored = Histogram()
    restored.load_state_dict(a.state_dict())
    assert restored.batch_ranges == [(1.0, 1.0), (2.0, 3.0)]
    with pytest.raises(ArgumentError, match="observe both alike"):
        a.merge(Histogram())


def test_a_state_with_missing_or_misshapen_parts_is_refused() -> None:
    state = observed(torch.tensor([1.0, 2.0])).state_dict()
    with pytest.raises(DataError, match=r"histogram state: got \[.*\], needed"):
        Histogram().load_state_dict({name: state[name] for name in state if name != "upper"})
    with pytest.raises(DataError, match=r"counts: got shape \(1,\), needed \(2,\)"):
        Histogram().load_state_dict(state | {"counts": state["counts"][:1]})
    with pytest.raises(DataError, match="keys"):
        Histogram().load_state_dict(state | {"keys": state["keys"] + 70_000})
