"""What is said of calibration data that do not fit, with the site's name; and data that must not do harm."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep.calibration.diagnostics import PLACES, Seen, halving, look, sentences, watching
from halfstep.errors import DataError, NotObservedError
from halfstep.progress import listening

X = torch.randn(256, 4, generator=torch.Generator().manual_seed(0))


def net(bias=0.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    model[0].bias.data += bias
    return model


def observed(*batches, model=None):
    q = hs.prepare(model or net(), X[:2])
    hs.observe(q, batches or [X])
    return q


def kinds(found):
    return [(concern.site, concern.concern.kind) for concern in found]


def test_nothing_is_said_of_data_that_fit():
    q = observed()
    hs.calibrate(q)
    assert hs.concerns(q, (hs.Max(), hs.MSE()), evaluation=[X + 0.01]) == ()


def test_a_dead_site_is_named():
    q = observed(model=net(bias=-100.0))
    with pytest.warns(UserWarning, match=r"site '1': all 1280 values are zero: the site is dead"):
        hs.calibrate(q)


def test_a_percentile_of_too_few_values_is_named():
    q = observed()
    with pytest.warns(
        UserWarning, match=r"site 'input': percentile\(99.999\) of 1024 values .* \(so too '1'\)"
    ):
        hs.calibrate(q, hs.Percentile(99.999))


def test_infinities_are_left_out_and_named():
    model = nn.Linear(4, 3)
    x = X.clone()
    x[0, 0] = float("inf")
    q = hs.prepare(model, X[:2])
    hs.observe(q, [x])
    with pytest.warns(UserWarning, match=r"site 'input': 0 NaN and 1 infinite values were left out"):
        hs.calibrate(q)
    assert q.sites["input"].range()[1] < 10


def test_nan_is_an_error_that_names_batch_and_site():
    x = X.clone()
    x[3, 1] = float("nan")
    with pytest.raises(DataError, match=r"calibration batch 1: site 'input': 1 of 1024 values are NaN"):
        observed(X, x)


def test_calibrators_that_disagree_are_named():
    x = X.clone()
    x[0, 0] = 1000.0
    q = observed(x)
    found = hs.calibrate(q, hs.best_of(hs.Max(), hs.Percentile(99)))
    assert ("input", "disagreement") in kinds(found.concerns)
    assert "max answers" in sentences(found.concerns)[0]


def test_other_data_are_told_apart_at_the_sites_where_they_differ():
    q = observed()
    found = hs.concerns(q, evaluation=[3 + X])
    assert kinds(found)[0] == ("input", "unlike")
    with pytest.raises(DataError, match=r"evaluation batch 0: input 'input': got shape \(2, 3\)"):
        hs.concerns(q, evaluation=[torch.randn(2, 3)])


def test_watching_counts_apart_and_only_the_first_examples():
    q = observed()
    before = q.sites["input"].histogram.count
    seen = Seen(q, examples=100)
    with watching(q, seen):
        for part in X.split(64):
            q(part)
    assert seen.histograms["input"].count == 100 * 4 and seen.full
    assert str(seen) == "100 examples of the evaluation were looked at"
    assert q.sites["input"].histogram.count == before
    assert not any(module._forward_pre_hooks for module in (q, *q.sites.values()))


@pytest.mark.parametrize("size", [1, 7, 64])
def test_what_is_looked_at_is_spread_over_the_data(size):
    q, watched, run = observed(), [], []
    seen, alone = Seen(q, len(X), 32), Seen(q, len(X), 32)
    with watching(q, seen):
        for part in X.split(size):
            before = seen.counted
            q(part)
            watched.append(seen.counted - before)
    q.register_forward_pre_hook(lambda _, args: run.append(len(args[0])))
    look(q, X.split(size), alone)
    place = 32 // PLACES  # of 256 / 8 examples
    assert seen.counted == sum(run) == 32 and max(watched) <= place * -(-size // 32)
    assert sum(watched[: len(watched) // 2]) == pytest.approx(16, abs=4)
    assert str(seen) == "32 of 256 examples of the evaluation were looked at"
    one, two = (each.histograms["input"].state_dict() for each in (seen, alone))
    assert all(torch.equal(one[part], two[part]) for part in one)  # an interrupted run sees the same examples


def test_a_warning_says_what_it_rests_on():
    labelled = [(3 + X, torch.zeros(256, dtype=torch.int64))] * 4
    with pytest.warns(
        UserWarning, match=r"values differ .*; 512 of 1,024 examples of the evaluation were looked"
    ):
        hs.quantize(net(), X[:2], [X], hs.Accuracy(labelled), 1.0, hs.Recipe.uniform(7, 8), rungs=("ptq",))


def test_halves_are_compared_and_add_up_to_what_one_pass_holds():
    q, whole = hs.prepare(net(), X[:2]), observed()
    batches = [scale * part for part, scale in zip(X.split(32), [1.0, 3.0] * 4, strict=True)]
    hs.observe(whole, batches)
    hs.observe(q, [X])
    with halving(q) as found:
        hs.observe(q, batches)
        assert found == []
    assert ("input", "unsteady") in kinds(found)
    for name, module in whole.sites.items():
        if not module.histogram.count:
            continue
        one, two = module.histogram.state_dict(), q.sites[name].histogram.state_dict()
        assert all(torch.equal(one[part], two[part]) for part in one)
    assert not q._forward_pre_hooks
    once = hs.prepare(net(), X[:2])
    with halving(once) as found:
        hs.observe(once, [X])
    assert found == []


def test_the_ladder_says_a_doubt_once():
    batches = [scale * part for part, scale in zip(X.split(32), [1.0, 3.0] * 4, strict=True)]
    labelled = [(3 * X, torch.zeros(256, dtype=torch.int64))]
    said = []
    listener = SimpleNamespace(
        start=lambda *_: None, advance=lambda *_: None, end=lambda *_: None, say=said.append
    )
    with warnings.catch_warnings(record=True) as warned, listening(listener):
        warnings.simplefilter("always")
        outcome = hs.quantize(net(), X[:2], batches, hs.Accuracy(labelled), max_drop=1.0)
    (sentence,) = [s for s in outcome.decisions if "on one half of the calibration data" in s]
    assert [str(w.message) for w in warned].count(sentence) == 1 and sentence not in said


def test_the_ladder_compares_calibration_data_with_the_metrics():
    labelled = [(5 + X, torch.zeros(256, dtype=torch.int64))]
    with pytest.warns(UserWarning, match=r"site 'input': calibration and evaluation values differ"):
        outcome = hs.quantize(net(), X[:2], [X], hs.Accuracy(labelled), max_drop=1.0)
    assert any("calibration and evaluation values differ" in sentence for sentence in outcome.decisions)


def test_a_sentence_for_every_kind():
    q = observed(model=net(bias=-100.0))
    lines = sentences(hs.concerns(q, (hs.Percentile(99.999),)))
    assert len(lines) == 2
    assert lines[0].startswith("site 'input': percentile(99.999) of 1024 values")
    assert lines[1].startswith("site '1': all 1280 values are zero")


# data that must do no harm


def test_a_first_batch_of_zeros():
    q = observed(torch.zeros(8, 4), X)
    histogram = q.sites["input"].histogram
    assert histogram.count == 8 * 4 + 1024
    assert (histogram.min, histogram.max) == (float(X.min()), float(X.max()))
    hs.calibrate(q)
    assert torch.isfinite(q(X)).all()


def test_a_tiny_first_batch_and_a_huge_value_later():
    huge = torch.zeros(1, 4)
    huge[0, 0] = 1e30
    q = observed(X[:8] * 1e-30, huge)
    histogram = q.sites["input"].histogram
    assert histogram.count == 36
    assert histogram.max == float(torch.tensor(1e30))
    assert len(histogram.state_dict()["keys"]) == 32 + 2  # zero and the huge one
    hs.calibrate(q)
    assert torch.isfinite(q(huge)).all()


def test_batches_of_any_size_count_alike():
    one, many = observed(X), observed(X[:1], X[1:8], X[8:100], X[100:])
    for name, module in one.sites.items():
        state, other = module.histogram.state_dict(), many.sites[name].histogram.state_dict()
        assert module.histogram.count == many.sites[name].histogram.count
        if name == "input":  # the others come from matrix products, whose rounding depends on the batch
            assert all(torch.equal(state[part], other[part]) for part in state)


def test_a_site_that_saw_nothing_is_named():
    q = hs.prepare(net(), X[:2])
    with pytest.raises(
        NotObservedError, match=r"site 'input': no finite value was observed; run at least one"
    ):
        hs.calibrate(q)
    assert kinds(hs.concerns(q))[0] == ("input", "unobserved")


class Places(torch.nn.Module):
    """What an image holds beside where it was taken, in metres, read by one layer."""

    def __init__(self):
        super().__init__()
        self.image, self.place = torch.nn.Linear(8, 8), torch.nn.Linear(2, 2)
        self.head = torch.nn.Linear(10, 3)

    def forward(self, x, place):
        return self.head(torch.cat([self.image(x).sigmoid(), self.place(place)], 1))


def test_a_part_that_is_lost_beside_another_is_named_with_its_reader():
    torch.manual_seed(0)
    inputs = torch.randn(64, 8), 500 * torch.randn(64, 2)
    q = hs.prepare(Places(), inputs)
    hs.observe(q, [inputs])
    [concern] = hs.concerns(q)
    assert concern.concern.kind == "lost"
    assert str(concern).startswith("site 'concat': its part 'sigmoid', ")
    assert "what reads them in one scale is 'head': in float it would lose nothing" in str(concern)
    even = inputs[0], inputs[1] / 500
    q = hs.prepare(Places(), even)
    hs.observe(q, [even])
    assert not hs.concerns(q)
