"""Goals without labels: near to the float model's own answers."""

import math

import pytest
import torch

import halfstep as hs
from halfstep.errors import ArgumentError, DataError, MetricError
from halfstep.evaluate import Several, against, classifies, early_stopping, labelled_data, paired_drop, parts
from halfstep.ladder.goal import GoalSpec

GENERATOR = torch.Generator().manual_seed(0)
INPUTS = [torch.randn(size, 5, generator=GENERATOR) for size in (40, 40, 20)]
WHOLE = torch.cat(INPUTS)
NOISE = 0.4 * torch.randn(100, 5, generator=GENERATOR)


class Counting:
    """The identity, or with noise, that counts its calls."""

    def __init__(self, noise=None):
        self.calls, self.noise = 0, noise

    def __call__(self, x):
        self.calls += 1
        if self.noise is None:
            return x.clone()
        places = [int((row == WHOLE).all(1).nonzero()[0]) for row in x]
        return x + self.noise[places]


def test_agreement_is_the_share_of_equal_classes():
    metric = hs.Agreement(INPUTS).against(Counting())
    assert metric.evaluate(Counting()).value == 1.0 and metric.bounds == (0, 1)
    expected = (WHOLE.argmax(1) == (WHOLE + NOISE).argmax(1)).double()
    score = metric.evaluate(Counting(NOISE))
    assert torch.equal(score.per_example, expected) and 0.5 < score.value < 1
    assert paired_drop(metric.evaluate(Counting()), score, bounds=metric.bounds).method == "Tango"


@pytest.mark.parametrize(("shape", "axis"), [((6, 7, 3), 2), ((6, 3, 4, 5), 1)])
def test_of_several_places_an_example_counts_with_the_share(shape, axis):
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    changed = inputs + torch.randn(shape, generator=torch.Generator().manual_seed(2))
    score = hs.Agreement([inputs]).against(lambda x: x).evaluate(lambda x: changed)
    equal = (inputs.argmax(axis) == changed.argmax(axis)).double()
    assert score.per_example.tolist() == pytest.approx([float(part.mean()) for part in equal])


def test_cosine_is_the_mean_of_the_examples_cosines():
    metric = hs.Cosine(INPUTS).against(Counting())
    assert metric.evaluate(Counting()).per_example.tolist() == [1.0] * 100
    by_torch = torch.nn.functional.cosine_similarity(WHOLE.double(), (WHOLE + NOISE).double())
    assert torch.allclose(metric.evaluate(Counting(NOISE)).per_example, by_torch, atol=1e-6)


@pytest.mark.parametrize(
    ("wanted", "got", "cosine"),
    [([0.0, 0], [0.0, 0], 1.0), ([0.0, 0], [1.0, 0], 0.0), ([1.0, 0], [0.0, 0], 0.0), ([1.0, 0], [-2.0, 0], -1.0),
     ([1.0, 0], [math.nan, 0], -1.0), ([1.0, 0], [math.inf, 0], -1.0), ([1e30, 0], [1e30, 0], 1.0)],
)  # fmt: skip
def test_cosines_at_the_edges(wanted, got, cosine):
    metric = hs.Cosine([torch.tensor([wanted])]).against(lambda x: x)
    assert metric.evaluate(lambda x: torch.tensor([got])).value == cosine


def test_sqnr_is_of_all_examples_together():
    metric = hs.SQNR(INPUTS).against(Counting())
    score = metric.evaluate(Counting(NOISE))
    ratio = float(WHOLE.double().square().sum() / ((WHOLE + NOISE) - WHOLE).double().square().sum())
    assert score.value == pytest.approx(10 * math.log10(ratio), abs=1e-6)
    own = metric.evaluate(Counting())
    assert own.value == pytest.approx(20 * math.log10(2**24))  # the rounding of float32
    drop = paired_drop(own, score)
    assert drop.low < drop.value < drop.high and drop.high - drop.low < 3


@pytest.mark.parametrize(
    ("wanted", "got", "decibels"),
    [([1.0], [math.nan], -144.494), ([1.0], [-math.inf], -144.494), ([0.0], [0.0], 144.494), ([0.0], [1.0], -144.494),
     ([1.0], [2.0], 0.0), ([1.0], [1e30], -144.494)],
)  # fmt: skip
def test_sqnr_at_the_edges(wanted, got, decibels):
    metric = hs.SQNR([torch.tensor([wanted])]).against(lambda x: x)
    assert metric.evaluate(lambda x: torch.tensor([got])).value == pytest.approx(decibels, abs=1e-3)


def test_nan_agrees_with_nothing():
    metric = hs.Agreement([torch.eye(3)]).against(lambda x: x)
    assert metric.evaluate(lambda x: torch.full((3, 3), math.nan)).value == 0


def test_the_float_model_answers_once_and_metrics_over_the_same_inputs_share_the_passes():
    network, model = Counting(), Counting(NOISE)
    names = {"agreement": hs.Agreement(INPUTS), "cosine": hs.Cosine(INPUTS), "sqnr": hs.SQNR(INPUTS)}
    waiting = Several(names)
    assert len(labelled_data(waiting)) == 1 and classifies(waiting)
    ready = against(waiting, network)
    assert network.calls == 3 and len(labelled_data(ready)) == 1
    assert against(ready, model) is ready and model.calls == 0  # it knows its float model
    score = ready.evaluate(model)
    assert network.calls == 3 and model.calls == 3
    for name, metric in names.items():
        alone = metric.against(Counting()).evaluate(Counting(NOISE)).value
        assert (score.others[name] if name != "agreement" else score).value == alone
    assert not any(part.place is not None for part in parts(waiting).values())  # left as they were


def test_agreement_is_judged_early_like_hits():
    metric = hs.Agreement(INPUTS).against(Counting())
    stopping = early_stopping(metric, metric.evaluate(Counting()))
    scores, side = stopping.run(lambda x: -x, max_drop=0.1, level=0.05)
    assert side == "above" and len(scores) < 100
    assert torch.equal(
        stopping.finish(lambda x: -x, scores).per_example, metric.evaluate(lambda x: -x).per_example
    )


class Anew:
    """Batches that are made anew each time, in an order that may change, as a loader's."""

    def __init__(self, *orders):
        self.orders = list(orders)

    def __iter__(self):
        order = self.orders.pop(0) if len(self.orders) > 1 else self.orders[0]
        return iter([INPUTS[place].clone() for place in order])


def test_loaders_come_in_the_same_order_or_are_refused():
    metric = hs.Agreement(Anew((0, 1))).against(Counting())
    assert metric.evaluate(Counting()).value == 1.0
    for orders, message in (
        (((0, 1), (1, 0)), "metric: batch 0 is not what it was when the float model answered to it"),
        (((0, 1), (0, 1, 2)), "metric: batch 2 is not what it was"),
        (((0, 1), (0,)), "metric: got 1 batches, and the float model answered to 2"),
    ):
        metric = hs.Agreement(Anew(*orders)).against(Counting())
        with pytest.raises(DataError, match=message):
            metric.evaluate(Counting())


def test_generators_are_kept():
    metric = hs.Cosine(batch for batch in INPUTS).against(Counting())
    assert metric.evaluate(Counting()).count == metric.evaluate(Counting()).count == 100


def test_what_is_compared_can_be_selected():
    def two(x):
        return {"ids": x.long(), "first": x, "second": -x}

    def other(x):
        return {"ids": x.long(), "first": x, "second": x}

    assert hs.Agreement(INPUTS).against(two).evaluate(other).value == 1
    assert hs.Cosine(INPUTS, lambda out: out["second"]).against(two).evaluate(other).value == -1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hs.Agreement(WHOLE), r"^Agreement: got Tensor, needed an iterable of batches .* such as \[inputs\]"),
        (lambda: hs.Cosine({"x": WHOLE}), r"^Cosine: got dict, needed an iterable of batches"),
        (lambda: hs.SQNR(3), r"^SQNR: got int, needed an iterable of batches"),
        (lambda: hs.SQNR(INPUTS).evaluate(Counting()), r"hs.SQNR compares with a float model and was given none: "),
        (lambda: hs.Agreement([WHOLE[:, :1]]).against(Counting()), r"^the float model's answer to batch 0: got outputs "
            r"of shape \(100, 1\), needed two classes at least.*hs.Cosine"),
        (lambda: hs.SQNR([WHOLE / 0]).against(Counting()), r"answer to batch 0: it holds NaN or inf, needed"),
        (lambda: hs.SQNR(INPUTS, len).against(Counting()), r"batch 0: got 40, needed floating-point outputs"),
        (lambda: hs.Cosine(INPUTS).against(Counting()).evaluate(lambda x: x[:, :2]), r"got outputs of shape \(40, 2\), "
            r"and the float model answered \(40, 5\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_said(make, message):
    with pytest.raises(MetricError, match=message):
        make()


def test_a_drop_of_sqnr_is_refused_with_what_to_write():
    alone, both = hs.SQNR(INPUTS), Several({"a": hs.Agreement(INPUTS), "noise": hs.SQNR(INPUTS)})
    with pytest.raises(ArgumentError, match=r"^max_drop: got 0.01 for hs.SQNR, needed .*floor=30: "):
        GoalSpec().check(alone)
    with pytest.raises(
        ArgumentError, match=r"^relative_drop of 'noise': got 0.1 .*such as floor=\{'noise': 30\}"
    ):
        GoalSpec(relative_drop=0.1).check(both)
    GoalSpec(floor=30).check(alone)
    GoalSpec(max_drop={"a": 0.01}, floor={"noise": 30}).check(both)
    metric = alone.against(Counting())
    goal = GoalSpec(floor=8).goal(metric.evaluate(Counting()), metric)
    for size, met in ((0.1, True), (0.9, True), (2.5, False)):
        score = metric.evaluate(Counting(size * NOISE))
        assert goal.met(score) == (score.value >= 8) == met
