import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfstep.errors import FormatError
from halfstep.fake_quantize import FakeQuantize
from halfstep.formats import Codebook, Format
from halfstep.formats.codebook import increasing, midpoints
from halfstep.functional import dequantize, fake_quantize, kmeans_codebook, lloyd_max_codebook, quantize
from halfstep.granularity import PerChannel, PerTensor

ONE = torch.ones(())

# bitsandbytes 0.4x, csrc/kernels.cu, dQuantizeNF4: the thresholds it compares with, sorted.
NF4_THRESHOLDS = [
    -0.8480964004993439,
    -0.6106329262256622,
    -0.4599952697753906,
    -0.33967943489551544,
    -0.23460740596055984,
    -0.13791173323988914,
    -0.045525018125772476,
    0.03979014977812767,
    0.1202552504837513,
    0.2035212516784668,
    0.2920137718319893,
    0.3893125355243683,
    0.5016634166240692,
    0.6427869200706482,
    0.8614784181118011,
]


def test_nf4_thresholds_are_those_of_bitsandbytes():
    assert Codebook.nf4().thresholds.tolist() == np.float32(NF4_THRESHOLDS).tolist()


def test_the_missions_rule():
    """Negative -> 0, [0, 1) -> 1, 1 and above -> 2."""
    rule = Codebook.rule([0, 1, 2], [0, 1], ties_up=True)
    x = torch.tensor([-3.0, -1e-30, -0.0, 0.0, 0.5, 0.999, 1.0, 7.0])
    assert fake_quantize(x, ONE, None, rule).tolist() == [0, 0, 1, 1, 1, 1, 2, 2]
    down = Codebook.rule([0, 1, 2], [0, 1])
    assert fake_quantize(x, ONE, None, down).tolist() == [0, 0, 0, 0, 1, 1, 1, 2]


def test_a_rule_without_zero_warns():
    with pytest.warns(UserWarning, match="no value 0"):
        Codebook.rule([-1, 1], [0])


def test_apot_levels():
    assert Codebook.apot(3, signed=False).values.tolist() == pytest.approx(
        [0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1]
    )
    levels = [0, 1 / 48, 1 / 24, 1 / 16, 1 / 12, 1 / 8, 1 / 6, 3 / 16, 1 / 4, 1 / 3, 3 / 8, 1 / 2]
    levels += [2 / 3, 11 / 16, 3 / 4, 1]
    assert Codebook.apot(4, signed=False).values.tolist() == pytest.approx(levels)
    mirrored = [-v for v in reversed(levels[1:])] + levels
    assert Codebook.apot(5).values.tolist() == pytest.approx(mirrored)
    assert Codebook.apot(2).values.tolist() == [-1, 0, 1]
    six = Codebook.apot(6, signed=False)
    assert six.levels == 64, "64 different sums"
    assert six.values[-1] == 1


def test_power_of_two_levels():
    assert Codebook.power_of_two(3).values.tolist() == [-1, -0.5, -0.25, 0, 0.25, 0.5, 1]
    smallest = Codebook.power_of_two(8).values
    assert smallest[smallest > 0].min() == 2.0**-126, "still a normal float32"


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("codebook", "compress"),
    [
        (Codebook.mu_law, lambda x: np.log1p(255 * x) / np.log(256)),
        (
            Codebook.a_law,
            lambda x: (
                np.where(x < 1 / 87.6, 87.6 * x, 1 + np.log(87.6 * np.maximum(x, 1 / 87.6)))
                / (1 + np.log(87.6))
            ),
        ),
    ],
)
def test_companded_values_are_even_after_compression(bits, codebook, compress):
    values = codebook(bits).values.double().numpy()
    assert len(values) == 2**bits - 1
    positive = values[values > 0]
    steps = 2 ** (bits - 1) - 1
    np.testing.assert_allclose(compress(positive), np.arange(1, steps + 1) / steps, rtol=1e-6)
    np.testing.assert_array_equal(values, -values[::-1])


def test_binary_and_ternary():
    x = torch.tensor([-2.0, -0.0, 0.0, 3.0])
    assert fake_quantize(x, torch.tensor(1.5), None, Codebook.binary()).tolist() == [-1.5, 1.5, 1.5, 1.5]
    assert fake_quantize(x, torch.tensor(1.5), None, Codebook.ternary()).tolist() == [-1.5, 0, 0, 1.5]
    assert (Codebook.binary().bits, Codebook.ternary().bits, Codebook.nf4().bits) == (1, 2, 4)


def test_facts():
    table = Codebook.nf4()
    assert isinstance(table, Format)
    assert table.symmetric
    assert table.reach == 1.0
    assert not Codebook.apot(3, signed=False).symmetric
    assert (str(table), repr(table)) == ("NF4 of 16", "Codebook(NF4, 16 values, 4 bits)")
    big = Codebook(torch.linspace(-1, 1, 257))
    assert (table.dtype, big.dtype, big.bits) == (torch.uint8, torch.int16, 9)


def test_equality_and_hash_go_by_content():
    assert Codebook.nf4() == Codebook.nf4()
    assert hash(Codebook.nf4()) == hash(Codebook.nf4())
    assert Codebook.nf4() != Codebook.apot(4)
    assert Codebook.rule([0, 1], [0.5]) != Codebook.rule([0, 1], [0.5], ties_up=True)
    assert Codebook.nf4() != "NF4"


def test_the_record_keeps_its_own_copy():
    values = torch.tensor([0.0, 1.0])
    table = Codebook(values)
    values[0] = 5.0
    assert table.values.tolist() == [0.0, 1.0]


def test_parameters_cover_the_range():
    scale, zero_point = Codebook.nf4().parameters(torch.tensor([-3.0, 0.0]), torch.tensor([2.0, 0.0]))
    assert scale.tolist() == [3.0, 1.0]
    assert zero_point.tolist() == [0, 0]
    one_sided = Codebook.apot(3, signed=False)
    assert one_sided.parameters(torch.tensor(-3.0), torch.tensor(2.0))[0] == 2.0, (
        "no negative values: they saturate"
    )
    lopsided = Codebook(torch.tensor([-0.5, 0.0, 1.0]))
    assert lopsided.parameters(torch.tensor(-3.0), torch.tensor(2.0))[0] == 6.0
    assert [end.item() for end in lopsided.range(torch.tensor(6.0))] == [-3.0, 6.0]
    absolute = Codebook.rule([0, 10], [5])
    assert absolute.parameters(torch.tensor(-3.0), torch.tensor(2.0))[0] == 1.0


def test_one_table_per_channel():
    table = Codebook(torch.tensor([[-1.0, 0.0, 1.0], [0.0, 10.0, 20.0]]), scaled=False)
    x = torch.tensor([[-0.9, 0.6, 9.0], [-0.9, 6.0, 16.0]])
    scale = torch.ones(2)
    codes = quantize(x, scale, None, table, PerChannel(0))
    assert codes.tolist() == [[0, 2, 2], [0, 1, 2]]
    assert dequantize(codes, scale, None, table, PerChannel(0)).tolist() == [[-1, 1, 1], [0, 10, 20]]
    assert fake_quantize(x.T, scale, None, table, PerChannel(1)).T.tolist() == [[-1, 1, 1], [0, 10, 20]]
    low, high = table.range(scale)
    assert (low.tolist(), high.tolist()) == ([-1, 0], [1, 20])


def test_tables_for_other_parameters():
    table = Codebook(torch.tensor([[-1.0, 1.0], [0.0, 10.0]]))
    with pytest.raises(
        FormatError, match=r"codebook: got tables for parameters of shape \(2,\), needed \(3,\)"
    ):
        fake_quantize(torch.zeros(3, 4), torch.ones(3), None, table, PerChannel(0))


@pytest.mark.parametrize(
    "values",
    [[1.0, 1.0], [2.0, 1.0], [0.0, float("nan")], [0.0, float("inf")], [0.0, 1e39], [1.0, 1.0 + 1e-12]],
)
def test_values_that_do_not_increase(values):
    with pytest.raises(
        FormatError, match=r"values: got .* needed finite float32 numbers that strictly increase"
    ):
        Codebook(torch.tensor(values, dtype=torch.float64))


def test_a_single_value():
    with pytest.raises(FormatError, match=r"values: got shape \(1,\), needed 2 or more"):
        Codebook(torch.tensor([1.0]))


def test_thresholds_that_do_not_fit():
    with pytest.raises(FormatError, match=r"thresholds: got shape \(2,\) for values of shape \(2,\)"):
        Codebook.rule([0, 1], [0, 1])
    with pytest.raises(FormatError, match=r"thresholds: got .* strictly increase"):
        Codebook.rule([0, 1, 2], [1, 0])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Codebook.mu_law(1), "bits: got 1, needed 2 to 16"),
        (lambda: Codebook.power_of_two(9), "bits: got 9, needed 2 to 8"),
        (lambda: Codebook.apot(1), "bits: got 1, needed 2 to 9 for APoT"),
        (lambda: Codebook.mu_law(4, mu=0), "mu: got 0, needed more than 0"),
        (lambda: Codebook.a_law(4, a=0.5), "a: got 0.5, needed 1 or more"),
    ],
)
def test_tables_that_cannot_be(build, message):
    with pytest.raises(FormatError, match=message):
        build()


def test_codes_that_are_not_in_the_table():
    with pytest.raises(FormatError, match="codes: got -1 to 16, needed 0 to 15 for NF4 of 16"):
        dequantize(torch.tensor([-1, 16]), ONE, None, Codebook.nf4())


# values next to each other

LARGEST, SMALLEST = 0x7F7FFFFF, 0x00800000  # bits of float32


@st.composite
def crowds(draw):
    """Float32 numbers that are equal, neighbours, or nearly so, around one or two numbers of any size."""
    around = draw(st.lists(st.integers(0, LARGEST) | st.sampled_from([0, SMALLEST, LARGEST]), max_size=2))
    places = [0x3F800001, *around]
    magnitudes = draw(
        st.lists(st.tuples(st.sampled_from(places), st.integers(-5, 5)), min_size=1, max_size=20)
    )
    bits = np.array([min(max(place + away, 0), LARGEST) for place, away in magnitudes], np.uint32)
    signs = draw(st.lists(st.booleans(), min_size=len(bits), max_size=len(bits)))
    return torch.from_numpy((bits | np.array(signs, np.uint32) << 31).view(np.float32).copy())


def strictly_increase(numbers):
    return bool((numbers.double().diff() > 0).all())


@given(crowds())
def test_thresholds_increase_wherever_values_do_and_a_value_is_its_own_nearest(numbers):
    values = numbers.double().unique().float()  # in float32 hypothesis may flush subnormals
    thresholds = midpoints(values)
    assert strictly_increase(thresholds)
    assert torch.equal(torch.bucketize(values.double(), thresholds.double()), torch.arange(len(values)))


@given(crowds())
def test_increasing_moves_only_what_it_must(numbers):
    found, wanted = increasing(numbers), numbers.double().sort().values
    assert strictly_increase(found)
    assert bool(found.isfinite().all())
    assert bool(((found == 0) | (found.abs() >= 2.0**-126)).all())
    room = len(numbers) * torch.finfo(torch.float32).eps * wanted.abs() + 2 * 2.0**-126
    assert bool(((found.double() - wanted).abs() <= room).all())


@settings(deadline=None)  # the first example compiles
@given(crowds(), st.integers(1, 4), st.sampled_from([kmeans_codebook, lloyd_max_codebook]))
def test_a_codebook_is_fitted_to_numbers_next_to_each_other(numbers, bits, fit):
    codebook = fit(numbers, bits)
    assert codebook.values.shape == (2**bits,)
    assert strictly_increase(codebook.values)
    assert strictly_increase(codebook.thresholds)
    normal = numbers[(numbers == 0) | (numbers.abs() >= 2.0**-126)]
    if len(normal) == len(numbers) and len(numbers.unique()) <= 2**bits:
        assert torch.equal(fake_quantize(numbers, ONE, None, codebook), numbers + 0.0)


@given(crowds().filter(lambda numbers: len(numbers) > 1))
def test_a_learned_codebook_stays_one_wherever_its_values_go(numbers):
    site = FakeQuantize("fc", Codebook(torch.arange(float(len(numbers))), scaled=False), PerTensor(), (3,))
    site.set_range(torch.tensor(0.0), torch.tensor(1.0))
    site.learn(values=True)
    site.values.data.copy_(numbers)
    format = site.format
    assert strictly_increase(format.values)
    assert strictly_increase(format.thresholds)
    assert site.range() == (format.lowest, format.highest)
