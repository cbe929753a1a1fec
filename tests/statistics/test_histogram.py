"""One pass over a stream: what is exact is exact, and the rest is known to the width of a bin."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from halfstep.errors import ArgumentError, NotObservedError
from halfstep.statistics import Histogram
from halfstep.statistics.bins import TAIL
from halfstep.statistics.histogram import _flat


def observed(*batches: torch.Tensor) -> Histogram:
    histogram = Histogram()
    for batch in batches:
        histogram.update(batch)
    return histogram


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


floats = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=60)
unhurried = settings(deadline=None)  # the first example of a process compiles


def test_a_histogram_by_hand() -> None:
    histogram = observed(torch.tensor([0.0, 1.0, 1.001, -2.0, -0.0]), torch.tensor(4.0))
    values, counts = histogram.bins()
    assert counts.tolist() == [1, 2, 2, 1]
    assert values.tolist() == pytest.approx([-2.0, 0.0, 1.0005, 4.0])
    assert (histogram.count, histogram.zero_count, histogram.min, histogram.max) == (6, 2, -2.0, 4.0)


@unhurried
@given(floats)
def test_extremes_and_counts_are_exact(numbers: list[float]) -> None:
    histogram = observed(torch.tensor(numbers))
    assert histogram.count == len(numbers)
    assert histogram.min == min(numbers)
    assert histogram.max == max(numbers)
    assert histogram.zero_count == sum(x == 0 for x in numbers)


@unhurried
@given(floats)
def test_the_sum_is_the_exact_sum_rounded_once(numbers: list[float]) -> None:
    assert observed(torch.tensor(numbers)).sum == float(sum(map(Fraction, numbers)))


def test_the_sum_survives_cancellation() -> None:
    assert observed(torch.tensor([1e30, 1.0, -1e30, 2.0**-149])).sum == 1.0
    assert observed(torch.tensor([1e30, 2.0**-149, -1e30])).sum == 2.0**-149


@unhurried
@given(floats)
def test_the_sum_of_squares_is_right_to_the_square_of_half_a_bin(numbers: list[float]) -> None:
    # Within a bin the spread is at most half its width, 2^-8 of the value; subnormals have no relative width.
    exact = sum(Fraction(x) ** 2 for x in numbers)
    assert math.isclose(
        observed(torch.tensor(numbers)).sum_of_squares, exact, rel_tol=2.0**-16, abs_tol=2.0**-240
    )


def test_the_sum_of_squares_of_smooth_data_is_right_to_a_millionth() -> None:
    x = random(200_000)
    assert math.isclose(observed(x).sum_of_squares, x.double().square().sum().item(), rel_tol=1e-6)


@unhurried
@given(
    st.lists(
        st.floats(-(2.0**100), 2.0**100, width=32).map(lambda x: x if abs(x) > 2**-100 else 0.0), min_size=1
    )
)
def test_every_bin_holds_the_mean_of_its_samples(numbers: list[float]) -> None:
    x = np.array(numbers, np.float32) + np.float32(0)  # no negative zero: it shares the bin of zero
    keys = x.view(np.uint32) >> 16
    expected = sorted(float(x[keys == key].astype(np.float64).mean()) for key in np.unique(keys))
    assert observed(torch.from_numpy(x)).bins()[0].tolist() == pytest.approx(expected, rel=1e-12)


def test_subnormals_are_apart_from_zeros() -> None:
    histogram = observed(torch.tensor([0.0, 1e-44, -1e-44, 3e-39, 0.0]))
    values, counts = histogram.bins()
    assert histogram.zero_count == 2
    assert counts.tolist() == [1, 2, 1, 1]
    assert values.tolist() == pytest.approx([-1e-44, 0.0, 1e-44, 3e-39], rel=0.02)  # 7 units of 2^-149


def test_nan_and_infinities_are_counted_and_part_of_nothing_else() -> None:
    clean = random(3000)
    dirty = clean.clone()
    dirty[[5, 500]] = math.nan
    dirty[[7, 700, 1700]] = torch.tensor([math.inf, -math.inf, math.inf])
    kept = clean[torch.isfinite(dirty)]
    histogram, expected = observed(dirty), observed(kept)
    assert (histogram.nan_count, histogram.inf_count) == (2, 3)
    assert histogram.count == 2995
    assert (histogram.min, histogram.max, histogram.sum) == (expected.min, expected.max, expected.sum)
    assert histogram.quantile(0.5) == expected.quantile(0.5)


def test_nan_with_any_payload_is_nan() -> None:
    bits = torch.tensor(
        [0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF], dtype=torch.int32
    )  # the last two have a sign
    histogram = observed(bits.view(torch.float32))
    assert (histogram.nan_count, histogram.inf_count, histogram.count) == (4, 0, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_widths_count_as_their_float32_values(dtype: torch.dtype) -> None:
    x = random(5000).to(dtype)
    for name, tensor in observed(x.float()).state_dict().items():
        assert torch.equal(observed(x).state_dict()[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.complex64])
def test_another_dtype_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ArgumentError, match=f"got a {dtype} tensor, needed float32, float16 or bfloat16"):
        Histogram().update(torch.zeros(3, dtype=dtype))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.permute(2, 0, 3, 1),
        lambda x: x[:, ::2],
        lambda x: x[1:, 1:, 1:, 1:],
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x[..., :1].expand(-1, -1, -1, 5),
        lambda x: x.requires_grad_(),
        lambda x: x[0, 0, 0, 0],
        lambda x: x.flatten()[1:],
    ],
    ids=["permuted", "strided", "cut", "channels last", "expanded", "in a graph", "scalar", "unaligned"],
)
def test_any_layout_counts_the_same_values(view) -> None:
    x = view(random(4, 6, 8, 10))
    expected = observed(x.detach().clone().contiguous().flatten()).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in observed(x).state_dict().items())


def test_a_dense_tensor_is_read_in_place() -> None:
    x = random(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert _flat(x).data_ptr() == x.data_ptr()
    assert _flat(x[:, :2]).data_ptr() != x.data_ptr()  # holes: this one has to be copied


def test_update_leaves_the_tensor_alone() -> None:
    x = random(1000)
    before = x.clone()
    observed(x)
    assert torch.equal(x, before)


def test_nothing_observed_has_counts_but_no_range() -> None:
    histogram = observed(torch.empty(0), torch.empty(3, 0, 2), torch.tensor([math.nan]))
    assert (histogram.count, histogram.sum, histogram.sum_of_squares) == (0, 0.0, 0.0)
    assert histogram.bins()[0].size == 0
    for ask in (lambda: histogram.min, lambda: histogram.max, lambda: histogram.quantile(0.5)):
        with pytest.raises(NotObservedError, match="no finite value was observed"):
            ask()


@unhurried
@given(floats, st.fractions(0, 1))
def test_quantiles_of_few_samples_are_exact(numbers: list[float], p: Fraction) -> None:
    rank = max(1, math.ceil(p * len(numbers)))
    histogram = observed(torch.tensor(numbers))
    assert histogram.quantile(p) == sorted(numbers)[rank - 1]
    assert histogram.magnitude_quantile(p) == sorted(map(abs, numbers))[rank - 1]


@unhurried
@given(
    st.integers(1, 2 * TAIL + 2) | st.integers(TAIL - 1, 2 * TAIL + 2),
    st.fractions(0, 1),
    st.sampled_from([(-1.0, 1.0), (0.0, 1.0), (-1.0, 0.0), (-0.25, 1.0), (-1.0, 0.25)]),
    st.integers(0, 99),
)
def test_quantiles_are_exact_as_long_as_the_ends_hold_all_samples(count, p, ends, seed) -> None:
    low, high = ends
    x = torch.empty(count).uniform_(low, high, generator=torch.Generator().manual_seed(seed))
    histogram, rank = observed(x), max(1, math.ceil(p * count))
    if count <= 2 * TAIL or (count - rank < TAIL):
        assert histogram.magnitude_quantile(p) == np.sort(np.abs(x.numpy()))[rank - 1]
    if count <= 2 * TAIL or rank <= TAIL or count - rank < TAIL:
        assert histogram.quantile(p) == np.sort(x.numpy())[rank - 1]


@pytest.mark.parametrize("outliers", [False, True])
def test_quantiles_equal_scipy_within_a_bin_and_exactly_in_the_tails(outliers: bool) -> None:
    x = random(200_000)
    if outliers:
        x[:20] *= 1e4
    histogram, d = observed(x), x.double().numpy()
    for p in (0.0, 1e-4, 0.003, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999, 1.0):
        expected = stats.quantile(d, p, method="inverted_cdf")
        exact = min(p, 1 - p) * x.numel() < 1024
        assert histogram.quantile(p) == pytest.approx(expected, rel=0 if exact else 2.0**-7, abs=0), p
        magnitude = stats.quantile(np.abs(d), p, method="inverted_cdf")
        exact = (1 - p) * x.numel() < 1024
        assert histogram.magnitude_quantile(p) == pytest.approx(magnitude, rel=0 if exact else 2.0**-7), p


def test_a_share_is_read_as_the_decimal_it_is_written_as() -> None:
    assert observed(torch.arange(1, 10_001).float()).quantile(0.9999) == 9999
    assert observed(torch.arange(1, 101).float()).quantile(0.07) == 7  # 0.07 * 100 is 7.000000000000001


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan])
def test_a_share_out_of_range_is_refused(p: float) -> None:
    with pytest.raises(ArgumentError, match="needed a share from 0 to 1"):
        observed(torch.ones(3)).quantile(p)


@unhurried
@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=200))
def test_slabs_stay_within_their_bins_and_the_data(numbers: list[float]) -> None:
    centres, halves, counts = observed(torch.tensor(numbers)).slabs()
    assert counts.sum() == len(numbers)
    assert (np.diff(centres) > 0).all()
    assert (halves <= np.maximum(np.abs(centres) * 2.0**-8, 2.0**-134)).all()
    assert (centres - halves).min() >= min(numbers)
    assert (centres + halves).max() <= max(numbers)


def test_evenly_filled_bins_keep_their_width_and_single_values_are_points() -> None:
    inner = observed(torch.linspace(1.0, 2.0, 100_001)).slabs()[1][1:-1]
    assert inner == pytest.approx(np.full(inner.size, 2.0**-8), rel=0.01)
    assert observed(torch.full((1000,), 0.1)).slabs()[1].tolist() == [0.0]
    assert observed(torch.tensor([0.0, 3.0, 6.0]).repeat(50)).slabs()[1].tolist() == [0.0, 0.0, 0.0]


def test_batch_ranges_are_kept_only_when_asked_for() -> None:
    histogram = Histogram(batch_ranges=True)
    for batch in ([1.0, 2.0], [-3.0, math.inf], [], [math.nan]):
        histogram.update(torch.tensor(batch))
    assert histogram.batch_ranges == [(1.0, 2.0), (-3.0, -3.0)]
    with pytest.raises(ArgumentError, match="observe with batch_ranges=True"):
        _ = Histogram().batch_ranges


def test_repr_says_what_was_seen() -> None:
    assert repr(Histogram()) == "Histogram(empty)"
    assert repr(observed(torch.tensor([-1.0, 2.5]))) == "Histogram(count=2, min=-1, max=2.5)"


@pytest.mark.parametrize(
    "kind", ["normal", "relu", "constant", "ascending", "few kinds", "negative zeros", "infinite"]
)
def test_the_ends_of_a_first_block_are_those_of_its_sorted_samples(kind: str) -> None:
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    x = {
        "normal": x,
        "relu": x.relu(),
        "constant": torch.full_like(x, -1.5),
        "ascending": x.sort().values,
        "few kinds": x.round(),
        "negative zeros": -x.relu(),
        "infinite": torch.where(x > 3, torch.inf, x),
    }[kind]
    histogram = Histogram()
    histogram.update(x)
    finite = x[x.isfinite()].sort().values + 0.0
    for rank in (1, 2, 1023, 1024):
        assert histogram.nth(rank) == float(finite[rank - 1])
        assert histogram.nth(finite.numel() + 1 - rank) == float(finite[-rank])


def test_blocks_with_zeros_and_without_take_turns():
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(5000, generator=generator)
    odd = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-40, -1e-40, 3e38, -3e38])
    x = torch.cat(
        [dense, torch.relu(dense), dense, odd, dense, torch.zeros(3000), dense[:100], odd[2:], dense]
    )
    whole, parts = Histogram(), Histogram()
    whole.update(x)
    for piece in x.split(97):
        parts.update(piece)
    one, other = whole.state_dict(), parts.state_dict()
    for part in ("keys", "counts", "offsets", "specials"):
        assert torch.equal(one[part], other[part]), part
    for part in ("upper", "lower"):
        assert torch.equal(one[part].sort().values, other[part].sort().values), part
    assert whole.zero_count == int((x == 0).sum())
