"""Numbers of a whole set: what a user's functions, or an object as torchmetrics' are, must give."""

import pytest
import torch

import halfstep as hs
from halfstep.errors import MetricError
from halfstep.evaluate import early_stopping, paired_drop
from halfstep.evaluate.resampling import drawn

INPUTS = torch.randn(120, 2, generator=torch.Generator().manual_seed(0))
LABELS = (INPUTS[:, 0] + 0.5 * INPUTS[:, 1] > 0.4).long()
LABELLED = list(zip(INPUTS.split(50), LABELS.split(50), strict=True))  # 50, 50, 20


def model(x):
    return torch.stack([0.4 - x[:, 0], x[:, 0]], 1)


def counts(outputs, labels):
    said, is_so = outputs.argmax(1) == 1, labels == 1
    return torch.stack([said & is_so, said & ~is_so, ~said & is_so], 1).double()


def f1(rows):
    hits, false, missed = rows.sum(0)
    return 2 * hits / (2 * hits + false + missed)


class F1:
    """As torchmetrics' are: a state that grows with each update."""

    def __init__(self):
        self.rows, self.updates = torch.full((3,), 1e6), 0

    def update(self, preds, target):
        self.rows = self.rows + counts(preds, target).sum(0)
        self.updates += 1

    def compute(self):
        return f1(self.rows[None])

    def reset(self):
        self.rows = torch.zeros(3)


class Precision:
    """As a detector's average precision is: lists with a dict for each image, several numbers at once."""

    def __init__(self):
        self.seen = []

    def update(self, preds, target):
        assert isinstance(preds, list) and isinstance(target, list)
        self.seen += zip(preds, target, strict=True)

    def compute(self):
        found = sum(int((boxes["scores"] > 0.5).sum()) for boxes, _ in self.seen)
        right = sum(min(int((boxes["scores"] > 0.5).sum()), len(names)) for boxes, names in self.seen)
        return {"map": torch.tensor(right / max(found, 1)), "found": found}

    def reset(self):
        self.seen.clear()


def test_functions_see_the_whole_set():
    score = hs.SetMetric(LABELLED, counts, f1, resamples=200).evaluate(model)
    whole = f1(counts(model(INPUTS), LABELS))
    assert score.value == float(whole) and score.count == 120 and score.per_example is None
    by_hand = [float(f1(counts(model(INPUTS[p]), LABELS[p]))) for p in drawn(120, 200)]
    assert score.resampled.values.tolist() == by_hand  # the model on the examples drawn says the same


def test_an_object_says_what_functions_say_and_is_left_reset():
    metric = F1()
    score = hs.SetMetric(LABELLED, metric, resamples=200).evaluate(model)
    same = hs.SetMetric(LABELLED, counts, f1, resamples=200).evaluate(model)
    assert score.value == pytest.approx(same.value) and score.count == 120
    assert torch.allclose(score.resampled.values, same.resampled.values)
    assert score.resampled.unit == "examples" and not metric.rows.any()
    assert metric.updates == 1 + 100 + 200  # all, without each part, each set drawn: one update each


def test_statistics_may_be_anything_and_labels_texts():
    """Word error rate: edits over words, with a sentence a label."""
    inputs = torch.arange(40.0)[:, None]
    texts = [f"a b {place % 3}" for place in range(40)]
    labelled = [(inputs[:25], texts[:25]), (inputs[25:], texts[25:])]

    def update(outputs, labels):
        heard = [f"a b {int(number) % 4}" for number in outputs]
        return [
            (sum(a != b for a, b in zip(x.split(), y.split(), strict=True)), len(y.split()))
            for x, y in zip(heard, labels, strict=True)
        ]

    def rate(pairs):
        return sum(edits for edits, _ in pairs) / sum(words for _, words in pairs)

    metric = hs.SetMetric(labelled, update, rate, higher_is_better=False)
    score = metric.evaluate(lambda x: x)
    wrong = sum(place % 3 != place % 4 for place in range(40))
    assert score.value == pytest.approx(wrong / 120) and score.count == 40
    half = metric.evaluate(lambda x: x // 2)
    drop = paired_drop(score, half, higher_is_better=False)
    assert drop.value == pytest.approx(half.value - score.value) and drop.low < drop.value < drop.high


def test_an_object_gets_lists_by_example_where_models_give_them():
    def detector(x):
        return [{"scores": row.sigmoid(), "boxes": torch.zeros(2, 4)} for row in x]

    labelled = [(x, [["cat"]] * len(x)) for x, _ in LABELLED]
    metric = hs.SetMetric(labelled, Precision(), lambda found: found["map"], resamples=200)
    score = metric.evaluate(detector)
    number = (INPUTS > 0).sum(1)
    assert score.value == pytest.approx(float(number.clamp(max=1).sum() / number.sum()))
    assert score.count == 120 and score.resampled.unit == "examples"


def test_batches_are_drawn_where_examples_cannot_be_told_apart():
    class Mean(F1):
        def update(self, preds, target):
            self.rows = self.rows + torch.tensor([float(preds["sum"]), 1.0, 0.0])

        def compute(self):
            return self.rows[0] / self.rows[1]

    labelled = [(x, None) for x in INPUTS.split(4)]
    metric = hs.SetMetric(labelled, Mean(), resamples=300)
    score, other = (
        metric.evaluate(lambda x: {"sum": x.sum()}),
        metric.evaluate(lambda x: {"sum": x[:, 0].sum()}),
    )
    assert score.resampled.unit == "batches" and score.resampled.count == 30 and score.count is None
    drop = paired_drop(score, other)
    assert (drop.count, drop.unit, drop.method) == (30, "batches", "bootstrap over batches")
    goal = hs.ladder.goal.Goal(drop.value, score)
    assert "other batches could decide otherwise (30 were used)" in goal.evidence(other)


def test_padding_by_batch_is_no_reason_to_be_told_apart():
    labelled = [(torch.ones(4, 2), torch.ones(4, length)) for length in range(3, 30)]

    class Sum(F1):
        def update(self, preds, target):
            self.rows = self.rows + target.sum()

        def compute(self):
            return self.rows[0]

    score = hs.SetMetric(labelled, Sum()).evaluate(lambda x: x)
    assert score.value == sum(4 * length for length in range(3, 30)) and score.resampled.unit == "batches"


def test_what_a_model_uses_again_is_kept_apart():
    buffer = torch.empty(50, 2)

    def reusing(x):
        buffer[: len(x)] = model(x)
        return buffer[: len(x)]

    assert hs.SetMetric(LABELLED, F1(), resamples=200).evaluate(reusing).value == pytest.approx(
        float(f1(counts(model(INPUTS), LABELS)))
    )


def test_no_verdict_is_early_and_the_reason_is_said():
    metric = hs.SetMetric(LABELLED, counts, f1)
    assert early_stopping(metric, metric.evaluate(model)) == (
        "the metric is a number of the whole set, of which some of the examples say nothing sure"
    )


def raising(*_):
    raise ZeroDivisionError("no positives")


@pytest.mark.parametrize(
    ("update", "compute", "message"),
    [
        (raising, f1, r"update\(outputs, labels\) \(batch 0\) raised ZeroDivisionError: no positives"),
        (lambda o, t: counts(o, t).sum(0), f1, r"gave a tensor of shape \(3,\), needed the statistics of each of 50"),
        (lambda o, t: [1, 2], f1, r"gave a list of 2, needed the statistics of each of 50 examples"),
        (lambda o, t: 1.0, f1, r"gave float, needed the statistics of each of 50"),
        (lambda o, t: torch.tensor(1.0), f1, r"gave Tensor, needed the statistics of each of 50"),
        (lambda o, t: torch.ones(len(o), len(o)), f1, r"of several kinds, \(20\) of torch.float32 and \(50\) of"),
        (counts, raising, r"compute\(statistics\) raised ZeroDivisionError: no positives"),
        (counts, lambda rows: float("nan"), r"compute gave nan, needed a finite number"),
        (counts, lambda rows: rows.sum(0), r"compute gave a tensor of shape \(3,\), needed one number"),
        (counts, lambda rows: {"f1": 1, "map": 2}, r"compute gave dict with 'f1', 'map', needed one number; .*compute"),
        (counts, lambda rows: "1.0", r"compute gave str, needed one number"),
        (Precision(), None, r"^metric: Precision.update\(outputs, labels\) raised AssertionError"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(update, compute, message):
    with pytest.raises(MetricError, match=message):
        hs.SetMetric(LABELLED, update, compute).evaluate(model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hs.SetMetric(LABELLED, counts), r"got update function and compute NoneType, needed update"),
        (lambda: hs.SetMetric(LABELLED, 3, f1), r"got update int and compute function"),
        (
            lambda: hs.SetMetric(LABELLED, counts, f1, resamples=100),
            r"got 100 resamples and 10.0 seconds, needed 200",
        ),
        (lambda: hs.SetMetric(LABELLED, counts, f1, seconds=0), r"a time above 0"),
        (lambda: hs.SetMetric([], counts, f1).evaluate(model), r"data are empty"),
        (
            lambda: hs.evaluate.as_scorer(F1()),
            r"got F1, which is to be updated .* hs.SetMetric\(labelled, it\)",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(MetricError, match=message):
        make()


def test_a_set_without_a_number_counts_as_none_and_the_object_is_reset():
    """One example in 120 is positive: a set drawn in three has none of it."""

    class Rare(F1):
        def compute(self):
            if not self.rows[0] + self.rows[2]:
                raise ZeroDivisionError
            return super().compute()

    rare = torch.zeros(120, dtype=torch.long)
    rare[0] = 1
    metric = Rare()
    score = hs.SetMetric([(INPUTS, rare)], metric, resamples=300).evaluate(model)
    share = float(score.resampled.values.isnan().double().mean())
    assert share == pytest.approx((1 - 1 / 120) ** 120, abs=0.08) and not metric.rows.any()
    assert "sets drawn the metric is no number" in paired_drop(score, score).reason
