"""A climb small enough to be killed again and again; every batch that its metric scores leaves a mark in a file."""

import random
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

import halfstep as hs

BATCHES = 2  # of a full evaluation


class CountedAccuracy(hs.Accuracy):
    """Writes a letter to a file for every batch scored, in whatever process."""

    def __init__(self, labelled, marks):
        super().__init__(labelled)
        self._marks = marks

    def __getstate__(self):
        return {**vars(self), "_marks": None}  # where it counts does not make it another metric

    def stream(self, *arguments, **options):
        for scores in super().stream(*arguments, **options):
            with self._marks.open("a") as file:
                file.write(".")
            yield scores


def normal(seed, *shape):
    """Numbers that are the same on every processor, which torch's normal ones are not to the last bit."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, np.float32))


def network(seed=0):
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        for place, layer in enumerate(model[::2]):
            layer.weight.copy_(normal([seed, place], *layer.weight.shape))
            layer.bias.zero_()  # or one class would win everywhere
    return model


def data(seed=1, count=128):
    inputs = normal(seed, count, 6)
    with torch.no_grad():
        return inputs, network()(inputs).argmax(1)


def climb(folder, marks=None, **options):
    """The climb; at 3 bits and without layers in float, so that no rung is passed by."""
    inputs, labels = data()
    calibration, _ = data(2)
    labelled = [(inputs[:64], labels[:64]), (inputs[64:], labels[64:])]
    settings = {
        "metric": hs.Accuracy(labelled) if marks is None else CountedAccuracy(labelled, Path(marks)),
        "recipe": hs.Recipe.uniform(3, 3),
        "max_drop": 0.01,
        "threads": 1,
        "training": hs.Training([data(5)], nn.functional.cross_entropy, epochs=3, evaluate_every=1),
        "max_float": 0.0,
        "calibration": list(calibration.split(32)),
        **options,
    }
    torch.set_num_threads(1)
    return hs.quantize(network(), inputs[:4], directory=folder, **settings)


def climb_in_a_process(folder, marks):
    """What a process that will be killed runs."""
    climb(folder, marks)


def kill_somewhere(process, within, seed):
    """SIGKILL after a random part of ``within`` seconds; False if it had ended by then."""
    time.sleep(random.Random(seed).uniform(0, within))
    if not process.is_alive():
        return False
    process.kill()
    process.join()
    return True
