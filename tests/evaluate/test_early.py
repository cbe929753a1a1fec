"""Early stopping on real metrics: the order is random, nothing is scored twice, refusals say why."""

import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep.errors import MetricError
from halfstep.evaluate import EarlyStopping, Score, early_stopping
from halfstep.evaluate.early import Shuffled, cannot_shuffle

INPUTS = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
LABELS = INPUTS[:, :3].argmax(1)
LABELLED = list(zip(INPUTS.split(64), LABELS.split(64), strict=True))


class Guess:
    """Right on all examples but a share of them; counts what it is asked."""

    def __init__(self, wrong=0.0):
        self.wrong, self.asked = wrong, 0

    def __call__(self, x):
        self.asked += len(x)
        flipped = (x[:, 3].abs() * 1e4) % 1 < self.wrong
        return torch.where(flipped[:, None], -x[:, :3], x[:, :3])


def stopping(**options):
    metric = hs.Accuracy(LABELLED, **options)
    return EarlyStopping(metric, metric.evaluate(Guess()))


def test_shuffling_draws_every_example_once_with_its_label():
    shuffled = Shuffled(LABELLED, seed=3)
    inputs, labels = (torch.cat(parts) for parts in zip(*shuffled.drawn(), strict=True))
    assert torch.equal(inputs, INPUTS[shuffled.order]) and torch.equal(labels, LABELS[shuffled.order])
    assert not torch.equal(shuffled.order, torch.arange(1000))
    later = torch.cat([x for x, _ in shuffled.drawn(100)])
    assert torch.equal(later, inputs[100:])


def test_dicts_of_tensors_can_be_shuffled_and_loaders_not():
    batches = [({"a": x, "b": x + 1}, y) for x, y in LABELLED]
    assert not cannot_shuffle(batches)
    drawn, _ = next(iter(Shuffled(batches).drawn()))
    assert torch.equal(drawn["a"] + 1, drawn["b"])
    for none in (iter(LABELLED), []):
        assert cannot_shuffle(none) == "the data are no list of batches"
    assert "something else than tensors" in cannot_shuffle([(INPUTS, [1, 2])])
    assert "differ in their first dimension" in cannot_shuffle([(INPUTS, LABELS[1:])])


@pytest.mark.parametrize(
    "labels", [torch.zeros(64, 5), torch.zeros(64, dtype=torch.int32), (torch.zeros(64), torch.zeros(64))]
)
def test_examples_of_another_shape_or_dtype_cannot_be_put_into_one_batch(labels):
    batches = [(INPUTS[:64], torch.zeros(64)), (INPUTS[64:128], torch.zeros(64)), (INPUTS[:64], labels)]
    assert cannot_shuffle(batches[:2]) == ""
    assert "batch 2 has examples of another shape or dtype than batch 0" in cannot_shuffle(batches)


def test_labels_padded_batch_by_batch_are_scored_whole():
    padded = [
        (x, nn.functional.pad(y[:, None], (0, width)))
        for (x, y), width in zip(LABELLED, range(16), strict=True)
    ]
    metric = hs.Metric(padded, lambda outputs, labels: outputs.argmax(1) == labels[:, 0], bounds=(0, 1))
    reason = early_stopping(metric, metric.evaluate(Guess()))
    assert "as padding batch by batch makes; give a list of batches" in reason


def test_a_run_goes_on_from_the_scores_of_an_earlier_one():
    early, model = stopping(), Guess(0.1)
    scores, answer = early.run(model, max_drop=0.05, level=0.05)
    asked = model.asked
    assert answer == "above" and asked < 1000
    assert early.run(model, 0.05, 0.05, seen=scores)[1] == "above" and model.asked == asked
    more, answer = early.run(model, 0.05, 1e-6, seen=scores)
    assert answer in ("above", None) and len(more) == model.asked > asked
    assert torch.equal(more, early.run(Guess(0.1), 0.05, 1e-6)[0])  # as if it had not been stopped


@pytest.mark.parametrize(("wrong", "side"), [(0.3, "above"), (0.0, "below")])
def test_a_clear_candidate_is_not_scored_on_everything(wrong, side):
    model = Guess(wrong)
    scores, answer = stopping().run(model, max_drop=0.05, level=0.05)
    assert answer == side and len(scores) == model.asked < 500


def test_a_good_candidate_is_scored_to_the_end_if_early_acceptance_is_not_wanted():
    scores, answer = stopping().run(Guess(), max_drop=0.05, level=0.05, accept=False)
    assert len(scores) == 1000 and answer is None


def test_finishing_scores_only_the_rest_and_gives_the_data_s_own_order():
    early, model = stopping(), Guess(0.3)
    scores, _ = early.run(model, max_drop=0.05, level=0.05)
    whole = early.finish(model, scores)
    assert model.asked == 1000
    assert torch.equal(whole.per_example, hs.Accuracy(LABELLED).evaluate(Guess(0.3)).per_example)


def test_a_loader_that_is_said_to_be_shuffled_is_taken_in_its_order():
    class Loader:
        def __iter__(self):
            return iter(LABELLED)

    metric = hs.Accuracy(Loader(), shuffled=True)
    early = early_stopping(metric, metric.evaluate(Guess()))
    scores, answer = early.run(Guess(0.3), max_drop=0.05, level=0.05)
    assert answer == "above"
    assert torch.equal(early.finish(Guess(0.3), scores).per_example, metric.evaluate(Guess(0.3)).per_example)
    more = early.run(Guess(0.3), 0.05, 1e-9, seen=scores)[0]
    assert len(more) > len(scores) and torch.equal(more, early.run(Guess(0.3), 0.05, 1e-9)[0])
    assert "order that may carry information" in early_stopping(
        hs.Accuracy(Loader()), Score.mean(torch.ones(3))
    )


def test_a_metric_without_bounds_or_examples_never_stops_early():
    unbounded = hs.Metric(LABELLED, lambda outputs, labels: outputs[:, 0])
    assert "no known bounds" in early_stopping(unbounded, unbounded.evaluate(Guess()))
    assert "no scores of single examples" in early_stopping(hs.CallableMetric(lambda m: 1.0), Score(1.0))
    pixels = hs.Metric(LABELLED, lambda o, y: o.flatten().sigmoid(), bounds=(0, 1))
    assert "another number of scores" in early_stopping(pixels, pixels.evaluate(Guess()))


def test_bounds_that_do_not_hold():
    metric = hs.Metric(LABELLED, lambda outputs, labels: outputs[:, 0] * 0 + 2, bounds=(0, 1))
    with pytest.raises(MetricError, match=r"batch 0 has scores from 2 to 2, outside the bounds \(0, 1\)"):
        metric.evaluate(Guess())
    with pytest.raises(MetricError, match=r"bounds are \(1, 0\), needed two finite numbers"):
        hs.Metric(LABELLED, lambda o, y: o, bounds=(1, 0))
