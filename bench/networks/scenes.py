"""Scenes composed of Fashion-MNIST: up to four pieces of clothing on a noisy ground, with their boxes and outlines."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from bench import fashion

MOST = 4
#: Kinds of clothing for segmentation; 0 is the ground.
KINDS = torch.tensor([1, 2, 1, 1, 1, 3, 1, 3, 3, 3])  # above the waist, trousers, shoes and bags


@dataclass(frozen=True)
class Scene:
    """An image (1, size, size), the boxes (n, 4) of what is on it as x1, y1, x2, y2 in pixels, classes (n,), and a map
    (size, size) of kinds."""

    image: torch.Tensor
    boxes: torch.Tensor
    classes: torch.Tensor
    kinds: torch.Tensor


def scenes(count: int, size: int, seed: int, part: str = "train") -> list[Scene]:
    """So many scenes of ``part`` of the images, the same for the same seed.

    Args:
        count: how many.
        size: pixels of a side.
        seed: of what stands where.
        part: ``"train"``, ``"calibration"`` (5,000 images that are not in train) or ``"test"``.
    """
    data = fashion.load()
    images, labels = {
        "train": (data.train_images[:55_000], data.train_labels[:55_000]),
        "calibration": (data.train_images[55_000:], data.train_labels[55_000:]),
        "test": (data.test_images, data.test_labels),
    }[part]
    pixels = images * 0.353 + 0.286  # back to 0..1
    return list(_composed(pixels, labels, count, size, seed))


def _composed(
    pixels: torch.Tensor, labels: torch.Tensor, count: int, size: int, seed: int
) -> Iterator[Scene]:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    for _ in range(count):
        ground = 0.15 * torch.rand((1, 1, 4, 4), generator=generator)
        image = F.interpolate(ground, (size, size), mode="bilinear")[0, 0]
        image = image + 0.05 * torch.randn((size, size), generator=generator)
        kinds = torch.zeros(size, size, dtype=torch.long)
        boxes: list[tuple[int, int, int, int]] = []
        classes: list[int] = []
        for _ in range(rng.randint(1, MOST)):
            index = rng.randrange(len(pixels))
            side = rng.randint(size // 4, size // 2)
            piece = F.interpolate(pixels[index][None], (side, side), mode="bilinear")[0, 0]
            solid = piece > 0.08
            rows, columns = solid.any(1).nonzero()[:, 0], solid.any(0).nonzero()[:, 0]
            if not len(rows):
                continue
            left, top = rng.randint(0, size - side), rng.randint(0, size - side)
            box = (
                left + int(columns[0]),
                top + int(rows[0]),
                left + int(columns[-1]) + 1,
                top + int(rows[-1]) + 1,
            )
            if any(_overlap(box, other) > 0.15 for other in boxes):
                continue
            window = slice(top, top + side), slice(left, left + side)
            image[window] = torch.where(solid, rng.uniform(0.7, 1.2) * piece, image[window])
            kinds[window] = torch.where(solid, KINDS[labels[index]], kinds[window])
            boxes.append(box)
            classes.append(int(labels[index]))
        yield Scene(
            ((image - 0.286) / 0.353)[None],
            torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            torch.tensor(classes, dtype=torch.long),
            kinds,
        )


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """What both boxes share, over the smaller one."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b))
    return max(width, 0) * max(height, 0) / smaller


def images_of(some: Sequence[Scene]) -> torch.Tensor:
    """(scenes, 1, size, size)."""
    return torch.stack([scene.image for scene in some])
