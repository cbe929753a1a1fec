"""Distillation: what is compared, how that is found out, and that it trains whatever the outputs are."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import halfstep as hs
from halfstep.errors import TrainingError
from halfstep.ladder.float_score import float_evaluation
from halfstep.ladder.goal import Goal
from halfstep.ladder.qat import climb_qat
from halfstep.ladder.search import Search

INDICES = {
    shape: torch.zeros(shape, dtype=torch.int64) for shape in [(8,), (8, 5), (8, 4), (8, 6, 6), (8, 1)]
}


def own(outputs, labels):
    """A loss that tells nothing."""
    return outputs.sum()


@pytest.mark.parametrize(
    ("shape", "loss", "labels", "wanted"),
    [
        # torch's losses tell
        ((8, 4), F.cross_entropy, None, ("kl", 1, True)),
        ((8, 4, 6), nn.CrossEntropyLoss(label_smoothing=0.1), None, ("kl", 1, True)),
        ((8, 4), functools.partial(F.cross_entropy, label_smoothing=0.1), None, ("kl", 1, True)),
        ((8, 1), F.binary_cross_entropy_with_logits, None, ("bernoulli", None, True)),
        ((8, 4), nn.BCEWithLogitsLoss(), INDICES[8,], ("bernoulli", None, True)),
        ((8, 4), F.mse_loss, None, ("mse", None, True)),
        ((8, 4), nn.SmoothL1Loss(), None, ("mse", None, True)),
        # labels tell
        ((8, 4), own, INDICES[8,], ("kl", 1, True)),
        ((8, 5, 4), own, INDICES[8, 5], ("kl", 2, True)),
        ((8, 5, 4), own, INDICES[8, 4], ("kl", 1, True)),
        ((8, 4, 4), own, INDICES[8, 4], ("kl", 2, True)),
        ((8, 4, 6, 6), own, INDICES[8, 6, 6], ("kl", 1, True)),
        ((8, 6, 6, 4), own, INDICES[8, 6, 6], ("kl", 3, True)),
        ((8, 4), own, {"labels": INDICES[8,]}, ("kl", 1, True)),
        ((8, 4), own, torch.full((8, 4), 0.25), ("kl", 1, True)),
        ((8, 4), own, torch.full((8, 4), 0.5), ("mse", None, True)),
        ((8, 1), own, INDICES[8,], ("mse", None, True)),
        ((8,), own, torch.zeros(8), ("mse", None, True)),
        # they do not
        ((8, 4), own, (INDICES[8,], INDICES[8,]), ("mse", None, False)),
        ((8, 4), own, torch.zeros(8), ("mse", None, False)),
        ((8, 4, 6, 6), own, INDICES[8,], ("mse", None, False)),
        # there are none
        ((8, 4), None, None, ("kl", 1, False)),
        ((8, 5, 4), None, None, ("kl", 2, False)),
        ((8, 4, 6, 6), None, None, ("kl", 1, False)),
        ((8, 1), None, None, ("mse", None, True)),
        ((8,), None, None, ("mse", None, True)),
        ((8, 1, 6, 6), None, None, ("mse", None, True)),
        ((), None, None, ("mse", None, True)),
    ],
)
def test_what_outputs_are_is_found_out(shape, loss, labels, wanted):
    found = hs.Distillation().comparison(torch.zeros(shape), loss, labels)
    assert (found.measure, found.axis, found.sure) == wanted
    assert float(found.loss(torch.zeros(shape), torch.zeros(shape))) == 0.0
    assert ("give hs.Distillation(axis=...)" in str(found)) == (not found.sure)


@pytest.mark.parametrize(
    ("options", "shape", "wanted"),
    [
        ({"axis": -1}, (8, 4, 6, 6), ("kl", 3)),
        ({"axis": 2}, (8, 4, 6), ("kl", 2)),
        ({"measure": "kl"}, (8, 4, 6, 6), ("kl", 1)),
        ({"measure": "mse"}, (8, 4), ("mse", None)),
        ({"measure": "bernoulli"}, (8, 4), ("bernoulli", None)),
    ],
)
def test_what_is_asked_for_is_done_whatever_the_loss_tells(options, shape, wanted):
    found = hs.Distillation(**options).comparison(torch.zeros(shape), F.l1_loss)
    assert (found.measure, found.axis, found.sure) == (*wanted, True)


def test_it_says_what_was_chosen():
    words = str(hs.Distillation().comparison(torch.zeros(8, 4), F.cross_entropy))
    assert words == "KL divergence of the softmax over axis 1 of the output (batch, 4), as the loss tells"
    several = [torch.zeros(8, 2), torch.zeros(8, 1, requires_grad=True)]  # the input passed on, and a logit
    words = str(hs.Distillation().comparison(several, F.binary_cross_entropy_with_logits))
    assert words == "KL divergence of each number's sigmoid of output 1 of 2 (batch, 1), as the loss tells"


@pytest.mark.parametrize(
    ("options", "outputs", "message"),
    [
        (
            {"axis": 1},
            torch.zeros(8, 1),
            r"axis 1 of the output \(batch, 1\) has one entry, .*measure='bernoulli'",
        ),
        (
            {"measure": "kl"},
            torch.zeros(8, 1),
            r"has one entry, whose softmax is always 1: nothing would be trained",
        ),
        ({"measure": "kl"}, torch.zeros(8), r"no classes along axis 0 of the output \(batch\)"),
        (
            {"axis": 2},
            torch.zeros(8, 4),
            r"no classes along axis 2 of the output \(batch, 4\), needed one of the axes",
        ),
        ({"axis": -2}, torch.zeros(8, 4), r"no classes along axis -2 of the output"),
        ({}, {"best": torch.zeros(8, dtype=torch.int64)}, r"outputs \(dict\) hold no floating-point tensor"),
    ],
)
def test_outputs_that_cannot_be_compared_so(options, outputs, message):
    with pytest.raises(TrainingError, match=message):
        hs.Distillation(**options).comparison(outputs)
    with pytest.raises(TrainingError, match=message):
        hs.Distillation(**options).loss(outputs, outputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measure": "cosine"}, r"measure is 'cosine', needed 'kl', 'bernoulli', 'mse' or None"),
        ({"measure": "mse", "axis": 1}, r"axis is 1 beside measure 'mse', which has none; leave one out"),
        ({"weight": 0.0}, r"weight is 0.0, needed a number above 0"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(TrainingError, match=message):
        hs.Distillation(**options)


# the measures


def test_a_yes_or_no_answer_is_a_choice_of_two_classes():
    ours, theirs = torch.randn(2, 16, 3, generator=torch.Generator().manual_seed(0)) * 3
    pairs = [torch.stack([logit, torch.zeros_like(logit)], -1) for logit in (ours, theirs)]
    wanted = hs.Distillation(temperature=3.0, axis=-1).loss(*pairs)
    torch.testing.assert_close(
        hs.Distillation(temperature=3.0, measure="bernoulli").loss(ours, theirs), wanted
    )


@pytest.mark.parametrize(("factor", "offset"), [(1.0, 0.0), (1e-3, 1e3), (1e3, -50.0)])
def test_numbers_are_compared_in_units_of_their_own_spread(factor, offset):
    ours, theirs = torch.randn(2, 4096, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    numbers = hs.Distillation(measure="mse", weight=0.5)
    wanted = 0.5 * (ours - theirs).square().mean() / theirs.var(0, correction=0).mean()
    found = numbers.loss(factor * ours + offset, factor * theirs + offset)
    assert float(found) == pytest.approx(float(wanted), rel=2e-2 if offset == 1e3 else 1e-4)
    assert float(numbers.loss(theirs + 50.0, theirs)) == pytest.approx(0.5 * 2500.0, rel=0.05)


def test_numbers_without_any_spread_are_compared_all_the_same():
    numbers = hs.Distillation(measure="mse")
    assert float(numbers.loss(torch.full((4, 2), 3.0), torch.full((4, 2), 2.0))) == pytest.approx(0.25)
    assert float(numbers.loss(torch.ones(4, 2), torch.zeros(4, 2))) == pytest.approx(1.0)
    assert float(numbers.loss(torch.full((1, 2), 3.0), torch.full((1, 2), 2.0))) == pytest.approx(0.25)


@pytest.mark.parametrize("measure", ["kl", "bernoulli", "mse"])
def test_masked_classes_count_nothing(measure):
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([0.0, 0.0, 0.0, -torch.inf])
    ours = torch.randn(16, 4, generator=generator).requires_grad_()
    theirs = torch.randn(16, 4, generator=generator)
    distillation = hs.Distillation(measure=measure)
    loss = distillation.loss(ours + mask, theirs + mask)
    loss.backward()
    assert loss.item() > 0
    assert bool(ours.grad[:, :3].ne(0).all())
    assert bool(ours.grad[:, 3].eq(0).all())
    if measure == "kl":
        torch.testing.assert_close(loss, distillation.loss(ours[:, :3], theirs[:, :3]))


@pytest.mark.parametrize("measure", ["kl", "bernoulli", "mse"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_float_model_that_answers_nan_is_not_passed_over(measure, bad):
    theirs = torch.zeros(4, 3)
    theirs[1, 2] = bad
    assert not bool(hs.Distillation(measure=measure).loss(torch.zeros(4, 3), theirs).isfinite())


# in a training


class Net(nn.Module):
    """Two layers, and what is made of them."""

    def __init__(self, outputs, ending=lambda x, y: y):
        super().__init__()
        self.hidden, self.head, self.ending = nn.Linear(6, 16), nn.Linear(16, outputs), ending

    def forward(self, x):
        return self.ending(x, self.head(self.hidden(x).relu()))


X = torch.randn(128, 6, generator=torch.Generator().manual_seed(0))


def quantized(outputs, ending=lambda x, y: y):
    torch.manual_seed(0)
    q = hs.prepare(Net(outputs, ending).eval(), X[:2], hs.Recipe.uniform(2, 4, ends=None))
    hs.observe(q, [X])
    hs.calibrate(q)
    return q


def trained(q, labels, loss, **options):
    batches = [(X[part], None if labels is None else labels[part]) for part in torch.arange(128).split(32)]
    return hs.train(q, hs.Training(batches, loss, epochs=8, learning_rate=1e-2, **options))


ANSWERS = {
    "regression": (3, torch.randn(128, 3), F.mse_loss, "squared error"),
    "regression by a loss of one's own": (
        3,
        torch.randn(128, 3),
        lambda o, y: (o - y).abs().mean(),
        "squared error",
    ),
    "one number": (1, torch.randn(128, 1), nn.HuberLoss(), "squared error"),
    "one logit": (1, torch.ones(128, 1), F.binary_cross_entropy_with_logits, "each number's sigmoid"),
    "classes": (
        4,
        torch.zeros(128, dtype=torch.int64),
        lambda o, y: F.cross_entropy(o, y),
        "softmax over axis 1",
    ),
}


@pytest.mark.parametrize("what", ANSWERS)
def test_any_outputs_are_pulled_to_the_float_models(what):
    outputs, labels, loss, words = ANSWERS[what]
    torch.manual_seed(1)
    losses = {}
    for weight in (1e-6, 1e3):
        q = quantized(outputs)
        before = q.captured(X).detach()
        found = trained(q, labels, loss, distillation=hs.Distillation(weight=weight))
        assert words in found.distilled
        with torch.no_grad():
            got, wanted = (x.log_softmax(1) if outputs == 4 else x for x in (q(X), before))
            losses[weight] = float((got - wanted).square().mean())
    assert losses[1e3] < losses[1e-6] / 2


@pytest.mark.parametrize("outputs", [1, 3])
def test_without_a_loss_one_number_trains_and_more_are_asked_about(outputs):
    q = quantized(outputs)
    before = q.captured(X).detach()
    with torch.no_grad():
        start = float((q(X) - before).square().mean())
    if outputs == 1:
        found = trained(q, None, None)
    else:
        with pytest.warns(
            UserWarning, match=r"distillation: KL .* by its shape alone: give hs.Distillation\(axis"
        ):
            trained(quantized(outputs), None, None)
        found = trained(q, None, None, distillation=hs.Distillation(measure="mse"))
    assert "squared error" in found.distilled
    with torch.no_grad():
        assert float((q(X) - before).square().mean()) < start / 2


def test_maps_are_compared_along_their_channels():
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    images = torch.randn(16, 1, 6, 6)
    q = hs.prepare(net, images[:2])
    hs.observe(q, [images])
    hs.calibrate(q)
    labels = torch.zeros(16, 6, 6, dtype=torch.int64)
    for loss in (F.cross_entropy, lambda o, y: F.cross_entropy(o, y)):
        found = hs.train(q, hs.Training([(images, labels)], loss))
        assert found.distilled.startswith(
            "KL divergence of the softmax over axis 1 of the output (batch, 4, 6, 6)"
        )


def test_the_first_output_with_a_gradient_is_compared():
    q = quantized(4, lambda x, y: {"seen": x * 1.0, "scores": y, "best": y.argmax(1)})
    labels = torch.zeros(128, dtype=torch.int64)
    found = trained(q, labels, lambda o, y: F.cross_entropy(o["scores"], y))
    assert "axis 1 of output 1 of 3 (batch, 4), as the labels tell" in found.distilled


@pytest.mark.parametrize(
    ("ending", "options", "message"),
    [
        (
            lambda x, y: y,
            {"distillation": hs.Distillation(axis=1)},
            r"batch 0: Distillation: axis 1 .* one entry",
        ),
        (
            lambda x, y: (x * 1.0, y.argmax(1)),
            {"distillation": hs.Distillation(measure="mse")},
            r"batch 0: distillation has no gradient: no floating-point output",
        ),
        (
            lambda x, y: y.argmax(1),
            {},
            r"batch 0: distillation: the model's outputs \(Tensor\) hold no floating",
        ),
    ],
)
def test_distillation_that_would_be_idle_is_refused(ending, options, message):
    with pytest.raises(TrainingError, match=message):
        trained(quantized(1, ending), None, None, **options)


def test_a_run_that_goes_on_compares_what_it_compared_before(tmp_path):
    labels = torch.zeros(128, dtype=torch.int64)
    batches = [(X[part], labels[part]) for part in torch.arange(128).split(32)]
    training = hs.Training(batches, F.cross_entropy, epochs=0.5)
    first = hs.train(quantized(4), training, directory=tmp_path)
    again = hs.train(quantized(4), training, directory=tmp_path)
    assert again.resumed_at == again.steps == 2
    assert again.distilled == first.distilled
    assert again.distilled.endswith("as the loss tells")


def test_the_outcome_says_what_was_compared():
    labels = torch.zeros(128, dtype=torch.int64)
    metric, q = hs.Accuracy([(X, labels)]), quantized(4)
    baseline, made = float_evaluation(metric, q)
    search = Search(q, metric, Goal(0.0, baseline), made)
    climb_qat(search, hs.Training([(X, labels)], F.cross_entropy))
    assert any(
        sentence
        == "distillation from the float model: KL divergence of the softmax over axis 1 of the output "
        "(batch, 4), as the loss tells"
        for sentence in search.decisions
    )
    q = quantized(4)
    assert hs.train(q, hs.Training([(X, labels)], F.cross_entropy, distillation=None)).distilled == ""
