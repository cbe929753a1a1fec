"""A reader of rendered lines: convs, a bidirectional LSTM and CTC, on images as wide as their text (a CRNN).

The words are those of the sentences in ``bench.sentences``, drawn in Debian's DejaVu and Liberation fonts where they
are installed, else in the one that Pillow brings.

Source: Shi, Bai and Yao, An End-to-End Trainable Neural Network for Image-based Sequence Recognition (2015); Graves et
al., Connectionist Temporal Classification (2006).
"""

from __future__ import annotations

import functools
import random
import string
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import halfstep as hs
from bench.networks.task import Task, fit, trained
from bench.sentences import Sentence, parts, sentences

LETTERS = (
    string.ascii_letters + string.digits + string.punctuation + " "
)  # place 0 of the outputs is CTC's blank
HEIGHT, LONGEST = 24, 14
FONTS = Path("/usr/share/fonts/truetype")

#: A batch of images (batch, 1, HEIGHT, width), and the text on each.
Line = tuple[torch.Tensor, str]


class CRNN(nn.Module):
    """(batch, 1, 24, width) to logits (batch, width / 4, letters + 1)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        sizes = (1, 16, 32, 48, 64)
        strides = ((2, 2), (2, 2), (2, 1), (3, 1))
        layers: list[nn.Module] = []
        for channels, out, pool in zip(sizes, sizes[1:], strides, strict=False):
            layers += [
                nn.Conv2d(channels, out, 3, padding=1, bias=False),
                nn.BatchNorm2d(out),
                nn.ReLU(),
                nn.MaxPool2d(pool),
            ]
        self.convs = nn.Sequential(*layers)
        self.lstm = nn.LSTM(sizes[-1], width, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width, len(LETTERS) + 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.convs(images).squeeze(2).transpose(1, 2)
        return self.head(self.lstm(x)[0])


def drawn(count: int, seed: int, some: Sequence[Sentence]) -> list[Line]:
    """So many lines of one to three words, in changing fonts, sizes and shades, on a noisy ground."""
    rng, noise = random.Random(seed), np.random.default_rng(seed)
    words = [word for each in some for word in each.text.split() if len(word) <= LONGEST]
    lines = []
    while len(lines) < count:
        start = rng.randrange(len(words) - 3)
        text = " ".join(words[start : start + rng.randint(1, 3)])
        if 2 <= len(text) <= LONGEST:
            lines.append((_draw(text, rng, noise), text))
    return lines


@functools.cache
def _fonts() -> tuple[str | None, ...]:
    found = sorted(
        str(path)
        for folder in ("dejavu", "liberation")
        for path in (FONTS / folder).glob("*.ttf")
        if not any(word in path.name for word in ("Extra", "Oblique", "Italic"))
    )
    return tuple(found) or (None,)


@functools.cache
def _font(name: str | None, size: int) -> object:
    from PIL import ImageFont

    return ImageFont.load_default(size) if name is None else ImageFont.truetype(name, size)


def _draw(text: str, rng: random.Random, noise: np.random.Generator) -> torch.Tensor:
    """(1, HEIGHT, width), ink about 1 on a ground about 0."""
    from PIL import Image, ImageDraw

    font = _font(rng.choice(_fonts()), rng.randint(13, 17))
    left, _, right, _ = font.getbbox(text)  # type: ignore[attr-defined]
    width = 4 * -(-int(right - left + 8) // 4)
    image = Image.new("L", (width, HEIGHT), 0)
    place = (4 - left, rng.randint(1, 4))
    ImageDraw.Draw(image).text(place, text, fill=rng.randint(120, 255), font=font)  # type: ignore[arg-type]
    pixels = np.asarray(image, dtype=np.float32) / 255
    pixels = pixels + noise.normal(0.0, rng.uniform(0.02, 0.15), pixels.shape).astype(np.float32)
    return torch.from_numpy(pixels)[None]


def labelled(lines: Sequence[Line], batch: int = 32) -> list[tuple[torch.Tensor, list[str]]]:
    """Batches as wide as their widest line."""
    found = []
    for start in range(0, len(lines), batch):
        images, texts = zip(*lines[start : start + batch], strict=True)
        widest = max(image.shape[-1] for image in images)
        found.append((torch.stack([F.pad(x, (0, widest - x.shape[-1])) for x in images]), list(texts)))
    return found


def ctc(outputs: torch.Tensor, texts: Sequence[str]) -> torch.Tensor:
    """CTC's loss a letter."""
    log = outputs.log_softmax(-1).transpose(0, 1)
    letters = torch.tensor([LETTERS.index(letter) + 1 for text in texts for letter in text])
    lengths = torch.tensor([len(text) for text in texts])
    steps = torch.full((len(texts),), len(log), dtype=torch.long)
    return F.ctc_loss(log, letters, steps, lengths, zero_infinity=True)


def read(outputs: torch.Tensor) -> list[str]:
    """The best path, without repeats and blanks."""
    found = []
    for row in outputs.argmax(-1).tolist():
        before = [0, *row]
        found.append("".join(LETTERS[a - 1] for a, b in zip(row, before, strict=False) if a and a != b))
    return found


def mistakes(outputs: torch.Tensor, texts: Sequence[str]) -> torch.Tensor:
    """Of each line the edits that make it right, and its letters, (batch, 2)."""
    pairs = zip(read(outputs), texts, strict=True)
    return torch.tensor([[edits(said, text), len(text)] for said, text in pairs], dtype=torch.float64)


def edits(a: str, b: str) -> int:
    """Levenshtein's distance.

    >>> edits("kitten", "sitting")
    3
    """
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def error_rate(rows: torch.Tensor) -> torch.Tensor:
    """The character error rate."""
    return rows[:, 0].sum() / rows[:, 1].sum()


def lines() -> Task:
    """The character error rate on 1,000 lines, less is better."""
    training, calibration, test = parts(sentences())

    def train(model: nn.Module) -> None:
        everything = drawn(6_000, 0, training)

        def shuffled(epoch: int) -> list:
            rng = random.Random(epoch)
            order = sorted(everything, key=lambda line: (line[0].shape[-1] // 16, rng.random()))
            batches = labelled(order)
            rng.shuffle(batches)
            return batches

        fit(model, shuffled, ctc, 6, 3e-3)

    return Task(
        trained("lines", CRNN(), train),
        [images for images, _ in labelled(drawn(256, 1, calibration))],
        hs.SetMetric(labelled(drawn(1000, 2, test)), mistakes, error_rate, higher_is_better=False),
        {"images": {3: "width"}},
        dynamic_peer=True,
    )
