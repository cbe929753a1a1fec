"""A network whose channels differ by powers of two: the same function, so quantized as well as the usual one."""

import copy

import pytest
import torch

import halfstep as hs
from bench.repair import rescaled
from halfstep.demo import load_digits, train_digits

STREAMS = (
    (("stem.1", "block1.bn2"), ("block1.conv1", "block2.conv1", "block2.skip.0")),
    (("block1.bn1",), ("block1.conv2",)),
    (("block2.bn2", "block2.skip.1"), ("block3.conv1", "block3.skip.0")),
    (("block2.bn1",), ("block2.conv2",)),
    (("block3.bn2", "block3.skip.1"), ("fc",)),
    (("block3.bn1",), ("block3.conv2",)),
)
WIDTHS = {"W8A8": hs.Recipe.int8(), "W4A8": hs.Recipe.uniform(4, 8)}
DRAWS = range(10)


@pytest.fixture(scope="module")
def digits():
    return load_digits()


@pytest.fixture(scope="module")
def trained(digits):
    return train_digits(digits, epochs=10, width=8)


def swept(model, digits, recipe):
    q = hs.prepare(model, digits.train_images[:4], recipe)
    hs.observe(q, digits.calibration_batches())
    hs.calibrate(q, hs.best_of())
    return q


def outputs(model, images):
    with torch.no_grad():
        return model(images)
