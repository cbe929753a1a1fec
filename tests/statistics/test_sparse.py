"""Histograms without their empty bins add up as the histograms themselves do."""

import pickle

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from halfstep.statistics import Histogram, Sparse

STREAMS = arrays.arrays(np.float32, st.integers(0, 40), elements=st.floats(width=32))


def filled(*streams):
    histogram = Histogram()
    for stream in streams:
        histogram.update(torch.from_numpy(stream))
    return histogram


@given(STREAMS, STREAMS)
@settings(deadline=None, max_examples=50)
def test_what_is_merged_is_what_one_histogram_sees(one, two):
    found = Histogram()
    sent = pickle.loads(pickle.dumps(Sparse.of(filled(two))))
    Sparse.of(filled(one)).merged(sent).put(found)
    wanted = filled(one, two).state_dict()
    assert {name: tensor.tolist() for name, tensor in found.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in wanted.items()
    }


def test_nothing_and_much():
    nothing, much = (
        Sparse.of(Histogram()),
        Sparse.of(filled(np.random.default_rng(0).normal(size=9999).astype(np.float32))),
    )
    found = Histogram()
    nothing.merged(much).merged(nothing).put(found)
    assert found.count == 9999 and len(nothing.keys) == 0
