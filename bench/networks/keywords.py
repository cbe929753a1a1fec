"""A keyword spotter: a GRU over the log-mel frames of synthesized words, of any length.

A word is a sequence of voiced and hissing sounds: formants that glide, at a pitch and a speed of the speaker's own, and
noise over all. What is said, not who says it, tells the words apart.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import halfstep as hs
from bench.networks.task import Task, fit, trained

RATE, WINDOW, STEP, MELS, WORDS = 8000, 256, 128, 32, 12
#: First and second formant in Hz; None hisses.
SOUNDS: dict[str, tuple[float, float] | None] = {
    "a": (800, 1300),
    "e": (500, 1900),
    "i": (300, 2300),
    "o": (450, 850),
    "u": (320, 700),
    "s": None,
}
SPOKEN = ("asa", "aso", "esi", "eso", "isa", "iau", "aei", "oue", "sua", "usi", "ioe", "eau")

#: Frames (time, MELS), and which word it is.
Spoken = tuple[torch.Tensor, int]


class Spotter(nn.Module):
    """Frames (batch, time, MELS) and a mask (batch, time) to logits (batch, words)."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.enter = nn.Linear(MELS, width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.middle, self.head = nn.Linear(width, width), nn.Linear(width, WORDS)

    def forward(self, frames: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.gru(torch.relu(self.enter(frames)))[0]
        kept = mask[..., None].to(x.dtype)
        return self.head(torch.relu(self.middle((x * kept).sum(1) / kept.sum(1))))


def say(word: str, rng: random.Random, noise: np.random.Generator) -> np.ndarray:
    """A word as a waveform at 8 kHz."""
    pitch, tract = rng.uniform(90, 220), rng.uniform(0.85, 1.15)
    pieces = []
    for sound in word:
        count = int(RATE * rng.uniform(0.08, 0.18))
        time = np.arange(count) / RATE
        formants = SOUNDS[sound]
        if formants is None:
            piece = np.diff(noise.normal(0, 0.4, count + 1))
        else:
            glide = pitch * (1 + 0.1 * rng.uniform(-1, 1) * time / time[-1])
            phase = 2 * np.pi * np.cumsum(glide) / RATE
            piece = np.zeros(count)
            for harmonic in range(1, int(3500 / pitch)):
                near = [np.exp(-(((harmonic * pitch - tract * f) / 150) ** 2)) for f in formants]
                piece += (near[0] + 0.6 * near[1] + 0.01) * np.sin(harmonic * phase)
        pieces.append(piece * np.hanning(count) ** 0.3)
    sound = np.concatenate(pieces) * rng.uniform(0.3, 1.0)
    return sound + noise.normal(0, rng.uniform(0.02, 0.35), len(sound))


def _mel_filters() -> np.ndarray:
    """Triangles over the bins of a spectrum, evenly spaced in mel, (bins, MELS)."""
    highest = 2595 * np.log10(1 + RATE / 2 / 700)
    hertz = 700 * (10 ** (np.linspace(0, highest, MELS + 2) / 2595) - 1)
    bins = np.fft.rfftfreq(WINDOW, 1 / RATE)[:, None]
    rising = (bins - hertz[:-2]) / (hertz[1:-1] - hertz[:-2])
    falling = (hertz[2:] - bins) / (hertz[2:] - hertz[1:-1])
    return np.maximum(0, np.minimum(rising, falling))


def frames_of(sound: np.ndarray, filters: np.ndarray) -> torch.Tensor:
    """Log-mel energies, (time, MELS)."""
    windows = np.lib.stride_tricks.sliding_window_view(sound, WINDOW)[::STEP]
    power = np.abs(np.fft.rfft(windows * np.hanning(WINDOW))) ** 2
    return torch.from_numpy(np.log(power @ filters + 1e-3)).float()


def spoken(count: int, seed: int) -> list[Spoken]:
    rng, noise, filters = random.Random(seed), np.random.default_rng(seed), _mel_filters()
    found = []
    for _ in range(count):
        word = rng.randrange(WORDS)
        found.append((frames_of(say(SPOKEN[word], rng, noise), filters), word))
    return found


def labelled(some: Sequence[Spoken], batch: int = 32) -> list:
    """Batches as long as their longest word; the mask is 1 where one is spoken."""
    found = []
    for start in range(0, len(some), batch):
        frames, words = zip(*some[start : start + batch], strict=True)
        longest = max(map(len, frames))
        mask = torch.stack([(torch.arange(longest) < len(x)).long() for x in frames])
        padded = torch.stack([F.pad(x, (0, 0, 0, longest - len(x))) for x in frames])
        found.append(({"frames": padded, "mask": mask}, torch.tensor(words)))
    return found


def keywords() -> Task:
    """The share of 1,000 words that are heard right."""

    def train(model: nn.Module) -> None:
        everything = spoken(5000, 0)

        def shuffled(epoch: int) -> list:
            order = list(everything)
            random.Random(epoch).shuffle(order)
            return labelled(order)

        fit(model, shuffled, F.cross_entropy, 8, 3e-3)

    return Task(
        trained("keywords", Spotter(), train),
        [inputs for inputs, _ in labelled(spoken(256, 1))],
        hs.Accuracy(labelled(spoken(1000, 2))),
        {"frames": {1: "time"}, "mask": {1: "time"}},
        "mask",
        dynamic_peer=True,
    )
