"""Repairs in order: kept where they measure better, put back where they do not, and said."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import halfstep as hs
from halfstep.calibration.candidates import BestOf
from halfstep.errors import ArgumentError, DataError, NotObservedError
from halfstep.evaluate import Score, as_scorer
from halfstep.fidelity.compare import halves
from halfstep.journal import Journal
from halfstep.ladder import ptq, repairs
from halfstep.ladder.goal import Goal
from halfstep.ladder.repairs import PASSES, THOROUGH
from halfstep.ladder.search import Search
from halfstep.progress import listening
from halfstep.repair.record import Repair, Treated
from tests.ladder.clock import Clock
from tests.repair.networks import Net, built, calibrated, conv, images, residual


@pytest.fixture(scope="module")
def observed():
    return calibrated(built(residual), bits=3)


@pytest.fixture
def q(observed):
    return copy.deepcopy(observed)


def outputs(q):
    with torch.no_grad():
        return q(images(seed=1))


def harm(model, batches):
    """A pass that makes everything worse."""
    model.shifts["a"].shift.fill_(100.0)
    return Repair("harm", "nothing", (Treated("a", 0.0, 0.0),))


def test_all_together_come_nearer_to_the_float_network(q):
    found = hs.repair(q)
    first, last = found.trials[0].before, [t.after for t in found.trials if t.kept][-1]
    assert last.kl < first.kl / 2
    assert found.fitted == found.examples == 8
    assert [trial.repair.name for trial in found.trials] == [
        "equalization",
        "migration",
        "weight ranges",
        "GPTQ",
        "learned rounding",
        "bias correction",
    ]
    kept = [trial for trial in found.trials if trial.kept]
    assert all(trial.after.kl < trial.before.kl for trial in kept)
    assert found.kept == tuple(trial.repair.name for trial in kept)
    text = str(found)
    assert "repairs fitted on 8 and measured on 8 examples" in text
    assert all(trial.repair.name in text for trial in found.trials)


def test_what_measures_worse_is_put_back(q):
    before = outputs(q)
    found = hs.repair(q, [harm])
    assert found.kept == ()
    assert torch.equal(outputs(q), before)
    assert "harm put back: KL" in found.sentences()[0]


def test_what_finds_nothing_says_why():
    q = calibrated(
        built(lambda: Net(lambda m, x: m.b(F.gelu(m.a(x))).mean((2, 3)), a=conv(3, 4), b=conv(4, 5)))
    )
    (sentence,) = hs.repair(q, [hs.equalize]).sentences()
    assert sentence.startswith("equalization found nothing to do: ")


def test_the_metric_has_the_last_word(q):
    before = outputs(q)
    scores = iter([0.9, 0.8])
    found = hs.repair(q, [hs.gptq], metric=lambda model: next(scores))
    assert found.put_back
    assert found.kept == ()
    assert (found.score_before, found.score_after) == (0.9, 0.8)
    assert torch.equal(outputs(q), before)
    assert found.sentences()[-1] == "all together: metric 0.9000 to 0.8000, everything was put back"
    scores = iter([0.8, 0.9])
    assert hs.repair(q, [hs.gptq], metric=lambda model: next(scores)).kept == ("GPTQ",)


def test_a_budget_that_is_used_up_leaves_the_rest_out(q, monkeypatch):
    def slow(model, batches):
        done = hs.correct_bias(model, batches)
        clock[0] += 100.0
        return done

    clock = [0.0]
    monkeypatch.setattr(repairs.time, "perf_counter", lambda: clock[0])
    found = hs.repair(q, [slow, hs.gptq], budget=50.0)
    assert [trial.repair.name for trial in found.trials] == ["bias correction"]
    assert found.left_out == ("gptq",)
    assert "gptq was left out: the budget is used up" in found.sentences()


def test_a_pass_that_time_cuts_short_is_judged_by_what_it_did(q, monkeypatch):
    clock = Clock(during="GPTQ", after=2)
    monkeypatch.setattr(repairs.time, "perf_counter", clock)
    with listening(clock):
        found = hs.repair(q, [hs.gptq, hs.learn_rounding], budget=1000.0)
    layers = [layer.name for layer in q.layers if layer.operator.weight is not None]
    treated = [done.name for done in found.trials[0].repair.treated]
    assert treated == layers[:2] and len(layers) > 2
    assert found.kept == ("GPTQ",) and found.left_out == ("learn_rounding",)
    assert f"the time was up after {layers[1]}: the layers behind it are as they were" in found.sentences()
    offsets = [q.sites[f"{name}.weight"].offset is not None for name in layers]
    assert not any(offsets[2:]) and any(offsets[:2])


def test_a_pass_that_time_leaves_nothing_of_is_left_out(q, monkeypatch):
    before = outputs(q)
    times = iter([0.0, 0.0])  # the start, and the look before the first pass
    monkeypatch.setattr(repairs.time, "perf_counter", lambda: next(times, 100.0))
    found = hs.repair(q, [hs.gptq, hs.equalize], budget=50.0)
    assert found.trials == () and found.left_out == ("gptq", "equalize")
    assert torch.equal(outputs(q), before)


def test_a_pass_that_fails_leaves_the_model_as_it_was(q):
    def failing(model, batches):
        harm(model, batches)
        raise RuntimeError("stopped")

    before = outputs(q)
    with pytest.raises(RuntimeError, match="stopped"):
        hs.repair(q, [failing])
    assert torch.equal(outputs(q), before)


def test_the_halves_share_no_example(q):
    first, second = halves(q, q.sample)
    assert [len(x) for x in first] == [len(x) for x in second] == [4, 4]
    assert torch.equal(torch.cat([first[0], second[0]]), q.sample[0])
    assert [len(x) for part in halves(q, [images(1)]) for x in part] == [1, 1]


def test_batches_of_one_are_dealt_out_by_turns(q):
    singles = list(images(7).split(1))
    first, second = halves(q, singles)
    assert torch.equal(torch.cat(first), torch.cat(singles[1::2]))
    assert torch.equal(torch.cat(second), torch.cat(singles[::2]))
    first, second = halves(q, list(images(9).split(3)))
    assert (sum(map(len, first)), sum(map(len, second))) == (4, 5)


def test_outputs_that_are_no_classes_are_measured_by_signal_to_noise():
    q = calibrated(built(lambda: Net(lambda m, x: m.a(x.flatten(1)), a=nn.Linear(192, 1))), bits=2)
    found = hs.repair(q, [hs.gptq])
    assert found.by == "sqnr"


def test_bad_input(q):
    with pytest.raises(ArgumentError, match=r"budget: got 0, needed seconds above 0"):
        hs.repair(q, budget=0)
    with pytest.raises(DataError, match=r"keeps no calibration sample; run hs.observe"):
        hs.repair(q, batches=[])
    fresh = hs.prepare(built(residual), images(2))
    hs.observe(fresh, [images()])
    with pytest.raises(NotObservedError, match=r"has no range yet"):
        hs.repair(fresh)


def climbed(q, scores, monkeypatch, max_drop=0.01, quick=(hs.gptq,), thorough=(), **options):
    """The PTQ rung with one calibrator, one repair, and a metric that answers from a list."""
    answers = iter(scores)
    scorer = as_scorer(lambda model: next(answers))
    monkeypatch.setattr(ptq, "PASSES", quick)
    monkeypatch.setattr(ptq, "THOROUGH", thorough)
    search = Search(q, scorer, Goal(max_drop, Score(0.9)), **options)
    score = ptq.climb_ptq(search, BestOf((hs.MSE(),), (hs.MSE(),), by="kl", mixed=False))
    return search, score


def test_the_rung_repairs_what_misses_the_goal(q, monkeypatch):
    search, score = climbed(q, [0.6, 0.8], monkeypatch)
    assert score.value == 0.8
    assert search.best.what == "PTQ, repaired by GPTQ"
    assert q.sites["b.weight"].offset is not None
    assert search.decisions[-1] == (
        "PTQ, repaired by GPTQ: 0.8000, +0.1000 below float (allowed 0.01), 0.6000 before"
    )


def test_the_rung_takes_back_what_the_metric_does_not_like(q, monkeypatch):
    search, score = climbed(q, [0.6, 0.5], monkeypatch)
    assert score.value == 0.6
    assert search.best.what.startswith("PTQ, mse")
    assert q.sites["b.weight"].offset is None
    assert search.decisions[-1] == "PTQ, repaired by GPTQ: put back, 0.6000 would become 0.5000"


def test_the_rung_repairs_nothing_where_the_goal_is_met(q, monkeypatch):
    search, _ = climbed(q, [0.9], monkeypatch)
    assert not any("GPTQ" in sentence for sentence in search.decisions)


def test_the_rung_reconstructs_what_quick_repairs_leave_short_of_the_goal(q, monkeypatch):
    search, score = climbed(q, [0.6, 0.7, 0.8], monkeypatch, quick=(hs.weigh_ranges,), thorough=THOROUGH)
    assert score.value == 0.8
    assert search.best.what == "PTQ, repaired by weight ranges, reconstruction"
    assert [each for each in search.decisions if re.match(r"reconstruction on [1-3]: KL ", each)]
    assert search.decisions[-1] == (
        "PTQ, repaired by weight ranges, reconstruction: 0.8000, +0.1000 below float (allowed 0.01), 0.7000 before"
    )


def test_quick_repairs_are_judged_on_half_of_all_that_is_kept_and_thorough_ones_learn_on_the_reserve(
    q, monkeypatch
):
    def seen(name):
        def spy(model, batches):
            numbers[name] = torch.cat(list(batches))
            return hs.weigh_ranges(model, batches)

        return spy

    numbers, q.reserve = {}, [images(5, seed=8), images(7, seed=9)]
    climbed(q, [0.6, 0.7, 0.8], monkeypatch, quick=(seen("quick"),), thorough=(seen("thorough"),))
    first, _ = halves(q, q.sample)
    some, _ = halves(q, [*q.sample, *q.reserve])
    assert torch.equal(numbers["quick"], torch.cat(some))
    assert torch.equal(numbers["thorough"], torch.cat([*first, *q.reserve]))


def test_the_rung_reconstructs_nothing_where_quick_repairs_are_enough(q, monkeypatch):
    search, score = climbed(q, [0.6, 0.9], monkeypatch, quick=(hs.weigh_ranges,), thorough=THOROUGH)
    assert score.value == 0.9
    assert not any("reconstruction" in sentence for sentence in search.decisions)


def test_the_rung_takes_back_a_reconstruction_that_the_metric_does_not_like(q, monkeypatch):
    search, score = climbed(q, [0.6, 0.7, 0.65], monkeypatch, quick=(hs.weigh_ranges,), thorough=THOROUGH)
    assert score.value == 0.7
    assert search.decisions[-1] == (
        "PTQ, repaired by weight ranges, reconstruction: put back, 0.7000 would become 0.6500"
    )
    assert search.best.what == "PTQ, repaired by weight ranges"


def test_quick_and_thorough_repairs_share_the_time(q, monkeypatch):
    clock = Clock(during="GPTQ", after=0)
    monkeypatch.setattr(ptq.time, "perf_counter", clock)
    with listening(clock):
        search, score = climbed(q, [0.6, 0.7], monkeypatch, thorough=THOROUGH)
    assert score.value == 0.6
    assert not any("reconstruction" in sentence for sentence in search.decisions)


def test_a_killed_run_goes_on_with_its_reconstruction(q, tmp_path, monkeypatch):
    decided, states = [], []
    for passes in (THOROUGH, (again,)):
        with Journal(tmp_path) as journal:
            twin = copy.deepcopy(q)
            options = {"quick": (hs.weigh_ranges,), "thorough": passes, "journal": journal}
            search, _ = climbed(twin, [0.6, 0.7, 0.8], monkeypatch, **options)
            decided.append(search.decisions)
            states.append(twin.state_dict())
    assert decided[0] == decided[1]
    assert decided[0][-1].startswith("PTQ, repaired by weight ranges, reconstruction: 0.8000")
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def again(model, batches):
    pytest.fail("done before")


again.__name__ = "reconstruct"


def test_every_pass_is_public():
    assert all(each is getattr(hs, each.__name__) for each in (*PASSES, *THOROUGH))
