"""Segmentation of scenes by a U-Net, images of two sizes: which kind of clothing each pixel belongs to, or none."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

import halfstep as hs
from bench.networks.scenes import KINDS, Scene, images_of, scenes
from bench.networks.task import Task, fit, trained
from bench.networks.unet import UNet

SIZES, CLASSES = (48, 64), int(KINDS.max()) + 1


def labelled(some: Sequence[Scene], batch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    kinds = torch.stack([scene.kinds for scene in some])
    return list(zip(images_of(some).split(batch), kinds.split(batch), strict=True))


def areas(outputs: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
    """Of each image and kind the pixels that are said and are so, and those that are either, (batch, kinds, 2)."""
    said = outputs.argmax(1)
    found = []
    for kind in range(CLASSES):
        a, b = said == kind, kinds == kind
        found.append(torch.stack([(a & b).sum((1, 2)), (a | b).sum((1, 2))], 1))
    return torch.stack(found, 1).double()


def mean_overlap(rows: torch.Tensor) -> torch.Tensor:
    """Intersection over union of all images' pixels, as a mean over the kinds."""
    both, either = rows.sum(0).T
    return (both / either.clamp_min(1)).mean()


def outlines() -> Task:
    """The mean intersection over union on 400 scenes of either size."""

    def both(count: int, seed: int, part: str, batch: int) -> list:
        return [pair for size in SIZES for pair in labelled(scenes(count, size, seed, part), batch)]

    def train(model: nn.Module) -> None:
        everything = [scene for size in SIZES for scene in scenes(1500, size, 10, "train")]

        def shuffled(epoch: int) -> list:
            rng = random.Random(epoch)
            by_size = [[s for s in everything if s.image.shape[-1] == size] for size in SIZES]
            batches = [pair for group in by_size for pair in labelled(rng.sample(group, len(group)), 16)]
            rng.shuffle(batches)
            return batches

        fit(model, shuffled, F.cross_entropy, 6, 3e-3)

    return Task(
        trained("outlines", UNet(16, 1, CLASSES), train),
        [images for images, _ in both(128, 11, "calibration", 16)],
        hs.SetMetric(both(400, 12, "test", 20), areas, mean_overlap),
        {"x": {2: "height", 3: "width"}},
    )
