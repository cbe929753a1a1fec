import pytest
import torch

from halfstep.errors import FormatError
from halfstep.granularity import PerChannel, PerGroup, PerTensor, counts

ALL = [
    PerTensor(),
    PerChannel(0),
    PerChannel(1),
    PerChannel(-1),
    PerGroup(0, 2),
    PerGroup(1, 2),
    PerGroup(1, 4),
    PerGroup(-1, 3),
]


def test_parameter_shapes_are_those_of_onnx():
    assert PerTensor().parameter_shape((2, 3)) == ()
    assert PerChannel(1).parameter_shape((2, 3, 5)) == (3,)
    assert PerChannel(-1).parameter_shape((2, 3, 5)) == (5,)
    assert PerGroup(1, 2).parameter_shape((2, 4, 5)) == (2, 2, 5)
    assert PerGroup(1, 2).parameter_shape((2, 5, 5)) == (2, 3, 5), "a ragged last group counts"


@pytest.mark.parametrize("granularity", ALL, ids=str)
def test_expand_gives_each_element_its_parameter(granularity):
    """The parameter that an element sees, by the definition of each granularity."""
    shape = (3, 5, 4)
    parameter = torch.arange(float(torch.tensor(granularity.parameter_shape(shape)).prod())).reshape(
        granularity.parameter_shape(shape)
    )
    seen = granularity.expand(parameter, shape).expand(shape)
    for index in torch.cartesian_prod(*(torch.arange(size) for size in shape)).tolist():
        match granularity:
            case PerTensor():
                own = ()
            case PerChannel(axis):
                own = (index[axis],)
            case PerGroup(axis, size):
                own = list(index)
                own[axis] //= size
        assert seen[tuple(index)] == parameter[tuple(own)]


@pytest.mark.parametrize("granularity", ALL, ids=str)
def test_rows_and_back(granularity):
    x = torch.randn(3, 5, 4)
    rows = granularity.rows(x, float("nan"))
    assert torch.equal(granularity.unrows(rows, x.shape), x)
    assert int(rows.isnan().sum()) == rows.numel() - x.numel(), "only padding is filled in"


@pytest.mark.parametrize("granularity", ALL, ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 4), (3, 1, 4)])
def test_reductions_are_those_of_each_parameters_elements(granularity, shape):
    x = torch.randn(shape, dtype=torch.float64)
    owners = torch.arange(float(torch.tensor(granularity.parameter_shape(shape)).prod())).reshape(
        granularity.parameter_shape(shape)
    )
    seen = granularity.expand(owners, shape).expand(shape)
    facts = {
        "min": torch.min,
        "max": torch.max,
        "absmax": lambda v: v.abs().max(),
        "sum": torch.sum,
        "mean": torch.mean,
        "absmean": lambda v: v.abs().mean(),
    }
    for how, fact in facts.items():
        expected = torch.stack([fact(x[seen == owner]) for owner in owners.flatten()])
        found = granularity.reduce(x, how)
        assert found.shape == granularity.parameter_shape(shape)
        torch.testing.assert_close(found.flatten(), expected)
    lengths = [int((seen == owner).sum()) for owner in owners.flatten()]
    assert counts(granularity, x).flatten().tolist() == lengths


def test_nan_is_not_hidden_by_a_reduction():
    x = torch.tensor([[1.0, float("nan")], [2.0, 3.0]])
    assert PerChannel(0).reduce(x, "absmax").isnan().tolist() == [True, False]


@pytest.mark.parametrize("granularity", [PerChannel(3), PerChannel(-4), PerGroup(3, 2)], ids=str)
def test_an_axis_that_is_not_there(granularity):
    with pytest.raises(
        FormatError, match=r"axis: got -?\d for a tensor of shape \(2, 3, 4\), which has 3 axes"
    ):
        granularity.parameter_shape((2, 3, 4))


def test_a_group_of_nothing():
    with pytest.raises(FormatError, match="group size: got 0, needed 1 or more"):
        PerGroup(0, 0)


def test_an_extreme_of_nothing():
    with pytest.raises(FormatError, match=r"absmax of an empty tensor of shape \(0, 3\)"):
        PerTensor().reduce(torch.zeros(0, 3), "absmax")
    assert PerChannel(0).reduce(torch.zeros(0, 3), "absmax").shape == (0,), "no channel, no question"


def test_an_unknown_reduction():
    with pytest.raises(FormatError, match="reduction: got 'median', needed one of min, max"):
        PerTensor().reduce(torch.zeros(3), "median")  # type: ignore[arg-type]
