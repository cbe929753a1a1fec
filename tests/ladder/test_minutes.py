"""A budget in minutes ends whatever is going on, and hands back the best candidate."""

import time

import pytest

import halfstep as hs
from halfstep.ladder import qat
from halfstep.progress import Interrupted, interruptible, listening, may_go_on, protected, steps, track
from halfstep.snapshot import fingerprint
from tests.ladder.climbing import climb
from tests.ladder.clock import Clock


def spend(monkeypatch, during, after=1, **options):
    """A climb whose hour is over once so many steps of a loop are done, and the clock with what was begun after it."""
    clock = Clock(during, after)
    monkeypatch.setattr(time, "perf_counter", clock)
    settings = {"max_drop": 0.0, "strict": True, "budget": hs.Budget(minutes=30), **options}
    with listening(clock):
        outcome = climb(None, **settings)
    return outcome, clock


def check(outcome, rung):
    """That the outcome is whole, and its model the best candidate that was scored."""
    assert outcome.path[-1].rung == rung
    whole = [
        made
        for made in outcome.history
        if made.key
        and made.rung not in ("float", "deployed")
        and not made.what.startswith("only ")  # a diagnosis
    ]
    best = max((made for made in whole if made.examples == made.total), key=lambda made: made.score)
    assert outcome.score == best.score
    assert fingerprint(outcome.model) in {made.key for made in whole if made.score == outcome.score}
    assert outcome.deployed_score > 0 and outcome.verification.size > 0
    assert any("a larger budget goes on from here" in sentence for sentence in outcome.advice)


def begun(clock, *loops):
    """Which of these loops were begun when the time was up."""
    return [name for name in clock.late if any(loop in name for loop in loops)]


def test_ranking_ends_within_a_group(monkeypatch):
    outcome, clock = spend(monkeypatch, "one layer quantized at a time")
    check(outcome, "partial")
    assert outcome.path[-1].note.startswith("the budget is spent: 60")
    assert begun(clock, "judging", "evaluating") == ["evaluating the deployed file"]


def test_placing_quantizers_for_a_ranking_ends_too(monkeypatch):
    outcome, clock = spend(monkeypatch, "placing quantizers")
    check(outcome, "partial")
    assert "one layer quantized at a time" not in clock.late


@pytest.mark.parametrize("during", ["GPTQ", "bias correction", "weight ranges", "repairing", "measuring"])
def test_repairs_end_within_a_layer(monkeypatch, during):
    outcome, clock = spend(monkeypatch, during)
    check(outcome, outcome.path[-1].rung)
    assert outcome.path[-1].rung == "ptq" or outcome.path[-1].cost == 0  # the next one has no time at all
    assert not any(made.what.startswith("PTQ, repaired") for made in outcome.history)
    passes = begun(clock, "migration", "GPTQ", "learned rounding", "bias correction", "weight ranges")
    assert passes == []
    assert all(site.offset is None for site in outcome.model.sites.values())
    assert not any(bool(shift.shift.any()) for shift in outcome.model.shifts.values())


def test_tuning_ends_within_a_file(monkeypatch):
    options = {"max_drop": 1.0, "rungs": ("ptq",), "tune": True}
    outcome, clock = spend(monkeypatch, "files to race", after=2, **options)
    assert outcome.met and outcome.float_layers == () and outcome.model.float_layers == frozenset()
    assert any(
        "nothing is left in float for speed, the budget is spent" in said for said in outcome.decisions
    )
    assert clock.loops.count("files to race") == 1
    assert fingerprint(outcome.model) in {made.key for made in outcome.history}


def test_timing_layers_for_their_order_ends_within_a_file(monkeypatch):
    outcome, clock = spend(monkeypatch, "files to race", partial=hs.Partial(order="latency"))
    check(outcome, "partial")
    assert clock.loops.count("files to race") == 1


def test_files_of_the_rungs_before_are_left_out(monkeypatch):
    outcome, _ = spend(
        monkeypatch, "files of the rungs", max_drop=0.03, strict=False, training=None, max_float=1.0
    )
    assert [step.rung for step in outcome.path] == ["ptq", "partial"] and outcome.rung == "partial"
    assert any("size and speed of what came before were not measured" in said for said in outcome.decisions)
    files = next(entry.data["measured"]["files"] for entry in outcome.entries if entry.kind == "outcome")
    assert [point["name"] for point in files] == ["float", "final file"]
    assert outcome.model.float_layers == set(outcome.float_layers)


@pytest.mark.parametrize("during", ["evaluating float", "observing", "comparing calibrators"])
def test_there_is_always_one_candidate(monkeypatch, during):
    outcome, _ = spend(monkeypatch, during, after=0 if during.startswith("eval") else 1)
    check(outcome, "ptq")
    assert sum(made.rung == "ptq" for made in outcome.history) == 1


def test_an_evaluation_that_was_begun_is_finished(monkeypatch):
    outcome, _ = spend(monkeypatch, "evaluating PTQ", after=0)
    check(outcome, "ptq")
    assert all(made.examples == 128 for made in outcome.history if made.rung == "ptq")


def stop():
    raise Interrupted("enough")


def test_training_looks_at_the_budget_by_itself(monkeypatch):
    """No loop of it is ended from outside: steps that were trained are not thrown away."""

    def climb_qat(search, training):
        may_go_on()
        return training

    monkeypatch.setattr(qat, "climb_qat", climb_qat)
    with interruptible(stop):
        assert hs.QAT("trained").climb(None) == "trained"
        with pytest.raises(Interrupted):
            may_go_on()


def test_loops_ask_before_every_step_but_the_one_behind_the_last():
    asked = []
    with interruptible(lambda: asked.append(len(done))):
        done = []
        for item in track([1, 2, 3], "loop"):
            done.append(item)
        assert asked == [0, 1, 2]
        with steps("loop", 2) as advance:
            advance(1)
            advance(1)
        assert len(asked) == 3 + 2
        with protected():
            assert list(track([1, 2], "loop")) == [1, 2]
            may_go_on()
        assert len(asked) == 5
    may_go_on()


def test_what_is_asked_ends_the_loop_and_blocks_nest():
    seen, heard = [], Clock("nothing")
    with listening(heard), interruptible(lambda: None), interruptible(stop):
        with pytest.raises(Interrupted, match="enough"):
            seen += track([1, 2], "loop")
        with protected(), interruptible(lambda: seen.append("asked")):
            may_go_on()
    assert seen == ["asked"] and heard.loops == []
    seen += track([1, 2], "loop")
    assert seen == ["asked", 1, 2]
