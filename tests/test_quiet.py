"""Python's search for reference cycles beside torch's tracer and exporter."""

import gc
import weakref

import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep import quiet
from halfstep.graph.capture import capture


def test_the_search_for_cycles_is_as_it_was_behind_a_trace():
    """Paused while torch traces; what somebody froze or switched off stays so, and garbage of before is still found."""
    inputs = torch.randn(2, 3)

    def captured():
        return capture(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), inputs)

    assert gc.isenabled() and not gc.get_freeze_count()
    cycle = nn.Linear(1, 1)
    cycle.itself = [cycle]
    gone = weakref.ref(cycle)
    del cycle
    captured()
    assert gc.isenabled() and not gc.get_freeze_count()
    gc.collect()
    assert gone() is None
    gc.disable()
    try:
        captured()
        assert not gc.isenabled()
    finally:
        gc.enable()
    gc.freeze()
    try:
        captured()
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()


@pytest.mark.parametrize("imports", [True, False])
def test_only_what_is_imported_counts_as_old(monkeypatch, imports):
    """Else the networks of call after call would pile up until somebody searches everything."""
    monkeypatch.setattr(quiet, "MANY_MODULES", -1 if imports else 10**6)
    gc.collect()
    with quiet.quiet():
        made = [[]]
    assert any(each is made for each in gc.get_objects(generation=2)) == imports


def imported(made):
    """What torch's modules are, as far as the search knows: objects that many imports leave."""
    with quiet.quiet():
        made += [[] for _ in range(1000)]


@pytest.fixture
def many(monkeypatch):
    monkeypatch.setattr(quiet, "MANY_MODULES", -1)
    assert not gc.get_freeze_count()


def test_what_is_imported_is_left_out_until_the_last_block_ends(many):
    made, later = [], []
    with quiet.undisturbed():
        with quiet.undisturbed():
            imported(made)
        assert gc.get_freeze_count() >= len(made)
        searched = {id(each) for each in gc.get_objects()}
        assert not searched & {id(each) for each in made}
        imported(later)  # the exporter's, behind the tracer's
        assert not {id(each) for each in gc.get_objects()} & {id(each) for each in later}
        cycle = nn.Linear(1, 1)
        cycle.itself = [cycle]
        gone = weakref.ref(cycle)
        del cycle
        gc.collect()
        assert gone() is None  # a cycle of the block's own
    assert not gc.get_freeze_count()
    searched = {id(each) for each in gc.get_objects()}
    assert searched >= {id(each) for each in made + later}


def test_an_error_in_the_block_ends_it_too(many):
    def interrupted():
        imported([])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), quiet.undisturbed():
        interrupted()
    assert not gc.get_freeze_count()


def test_what_somebody_else_left_out_stays_so(many):
    gc.freeze()
    try:
        with quiet.undisturbed():
            before = gc.get_freeze_count()
            imported([])
            assert gc.get_freeze_count() <= before
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()


def test_a_run_leaves_them_out_from_capture_to_its_end(many):
    inputs, seen = torch.randn(64, 3), []

    def metric(model):
        seen.append(gc.get_freeze_count())
        return 1.0

    hs.quantize(
        nn.Sequential(nn.Linear(3, 4), nn.ReLU()), inputs, [inputs], metric, max_drop=0.5, rungs="ptq"
    )
    assert all(seen)
    assert not gc.get_freeze_count()
