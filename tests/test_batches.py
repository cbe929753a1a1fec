"""Evaluation in pieces: as fast as the fastest size, and the very same answers."""

import itertools

import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep import batches
from halfstep.batches import InPieces, parameters_once, scored
from halfstep.fake_quantize import FakeQuantize, Mode

#: Quarters, so that no order of summation makes a difference.
X = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)).mul(4).round() / 4


class Net(nn.Module):
    """A conv-free network whose answer may depend on the other examples, or hold something that is no example's."""

    def __init__(self, centred=False, extra=False):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.centred, self.extra = nn.Linear(4, 3), centred, extra
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(64).round_().div_(64)

    def forward(self, x):
        y = self.layer(x - x.mean(0) if self.centred else x)
        return (y, y.mean()) if self.extra else y


@pytest.fixture
def took(monkeypatch):
    """Seconds that are said to pass: the first batch in the smallest pieces and whole, the second in all sizes."""
    seconds = [0.9, 1.0, 0.6, 0.7, 0.5]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    calls = itertools.count()
    monkeypatch.setattr(batches, "_timed", lambda work: (work(), seconds[next(calls) % len(seconds)]))
    monkeypatch.setattr(batches, "SIZES", (64, 32))
    yield seconds
    torch.set_num_threads(threads)


def watched(q):
    """Sizes as they run; of those side by side the order is no one's."""
    sizes = []
    q.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    return sizes


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ([0.6, 0.7, 0.5], [8, 64, 64, 64]),  # of 32, 100 and 64
        ([0.4, 0.7, 0.5], [8] + [32] * 6),
        ([1.3, 0.8, 0.9], [100, 100]),
        ([1.3, 1.2, 1.1], [200]),
    ],
)
def test_the_third_batch_runs_at_the_size_that_was_fastest(took, seconds, expected):
    took[2:] = seconds
    q = hs.prepare(Net(), X[:2])
    sizes, model = watched(q), InPieces(q)
    with torch.no_grad():
        whole = q(X)
        assert torch.equal(model(X), whole) and torch.equal(model(X), whole)
        sizes.clear()
        assert torch.equal(model(X), whole)
    assert sorted(sizes) == expected


def test_the_second_batch_does_where_the_first_was_clearly_faster_so(took):
    took[0] = 0.4
    q = hs.prepare(Net(), X[:2])
    sizes, model = watched(q), InPieces(q)
    with torch.no_grad():
        model(X)
        sizes.clear()
        assert torch.equal(model(X), q(X))
    assert sorted(sizes) == [8] + [32] * 6 + [200]


def test_what_depends_on_the_other_examples_is_never_cut(took):
    q = hs.prepare(Net(centred=True), X[:2])
    sizes, model = watched(q), InPieces(q)
    with torch.no_grad():
        answers = [model(X) for _ in range(3)]
        assert all(torch.equal(answer, q(X)) for answer in answers)
    assert sizes[-2:] == [200, 200]


def test_nor_what_answers_with_more_than_one_row_an_example(took):
    model = InPieces(hs.prepare(Net(extra=True), X[:2]))
    sizes = watched(model.model)
    with torch.no_grad():
        assert [[*map(len, map(torch.atleast_1d, model(X)))] for _ in range(3)] == [[200, 1]] * 3
    assert sizes[-1] == 200


def test_other_shapes_and_other_layers_in_float_are_tried_anew(took):
    q = hs.prepare(Net(), X[:2])
    hs.observe(q, [X])
    hs.calibrate(q)
    sizes, model = watched(q), InPieces(q)
    with torch.no_grad():
        for _ in range(3):
            model(X)
        sizes.clear()
        model(X[:150])  # a shape that was not checked
        assert 150 in sizes
        q.float_layers = ["layer"]
        sizes.clear()
        model(X)
        assert 200 in sizes


def test_what_was_shown_of_layers_holds_for_all_that_they_do_together(took):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    q = hs.prepare(net, X[:2])
    hs.observe(q, [X])
    hs.calibrate(q)
    sizes = watched(q)
    with torch.no_grad(), q.using(Mode.FLOAT):
        for _ in range(2):
            InPieces(q)(X)
    with torch.no_grad():
        sizes.clear()
        assert torch.equal(
            InPieces(q)(X), q(X)
        )  # the first that quantizes: in pieces of the size that is known, and whole
        assert sorted(sizes) == [8, 64, 64, 64, 200, 200]
        q.float_layers = ["1"]  # in float as in the first, the other as in the second
        sizes.clear()
        InPieces(q)(X)
    assert sorted(sizes) == [8, 64, 64, 64]


def test_weights_are_quantized_once_a_batch(took, monkeypatch):
    q = hs.prepare(Net(), X[:2])
    hs.observe(q, [X])
    hs.calibrate(q)
    model, seen = InPieces(q), []
    rounded = FakeQuantize.rounded
    monkeypatch.setattr(FakeQuantize, "rounded", lambda self, *x: seen.append(self.name) or rounded(self, *x))
    with torch.no_grad():
        whole = model(X)
        model(X)
        seen.clear()
        assert torch.equal(model(X), whole)
        assert seen.count("layer.weight") == 1 and seen.count("x") == 4
        q.weight("layer.weight").mul_(2)
        assert torch.equal(model(X), q(X)) and not torch.equal(model(X), whole)
    model(X).sum().backward()
    assert q.weight("layer.weight").grad is not None


def test_weights_that_take_too_much_memory_are_not_held(monkeypatch):
    q = hs.prepare(Net(), X[:2])
    hs.observe(q, [X])
    hs.calibrate(q)
    with torch.no_grad(), parameters_once(q):
        assert q.sites["layer.weight"].held is not None
    assert q.sites["layer.weight"].held is None
    monkeypatch.setattr(batches, "HELD_WEIGHTS", 59)  # 12 weights and 3 biases take 60 bytes
    with torch.no_grad(), parameters_once(q):
        assert q.sites["layer.weight"].held is None


def test_a_score_sees_whole_batches_and_the_same_answers_as_without(took):
    seen = []

    def score(outputs, labels):
        seen.append(len(outputs))
        return outputs.sum(1) + labels

    metric = hs.Metric([(X, torch.zeros(200))] * 4, score)
    q = hs.prepare(Net(), X[:2])
    whole = metric.evaluate(q)
    sizes = watched(q)
    assert torch.equal(metric.evaluate(scored(q, metric)).per_example, whole.per_example)
    assert set(seen) == {200} and min(sizes) < 200


class Own(hs.Accuracy):
    def stream(self, model, labelled=None):
        yield from super().stream(model.captured and model, labelled)


def test_a_metric_that_goes_its_own_way_gets_the_model_itself():
    q, labelled = hs.prepare(Net(), X[:2]), [(X, torch.zeros(200, dtype=torch.int64))]
    assert scored(q, Own(labelled)) is q and scored(q, hs.CallableMetric(lambda model: 0.0)) is q
    assert isinstance(scored(q, hs.Accuracy(labelled)), InPieces)


def test_a_run_goes_on_whatever_size_was_fastest_then(monkeypatch, tmp_path, took):
    labels = Net()(X).argmax(1)

    def run():
        metric = hs.Accuracy([(X, labels)] * 4)
        recipe = hs.Recipe.uniform(7, 8)
        return hs.quantize(Net(), X[:2], [X + 1e-3], metric, 0.1, recipe, directory=tmp_path, rungs=("ptq",))

    first = run()
    monkeypatch.setattr(batches, "SIZES", ())
    again = run()
    assert again.evaluations == first.evaluations and again.score == first.score
    assert again.deployed_score == first.deployed_score
