"""A detector as later YOLOs are: two scales, no anchors, distances as distributions, boxes decoded inside the network.

The head gives for each of the four sides a distribution over whole cells, whose expectation is the distance (DFL); the
decoded boxes, 0 to the image's size, and the scores, 0 to 1, are put together in one output as exported YOLOs do it:
(batch, 4 + classes, places). NMS follows outside. Places are assigned to true boxes by how well they answer already.

Source: Li et al., Generalized Focal Loss (2020), section 3; Feng et al., TOOD (2021), section 3.2, for the assignment.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

import halfstep as hs
from bench.average_precision import Matched, match, mean_average_precision, overlaps, suppress
from bench.networks.scenes import MOST, Scene, images_of, scenes
from bench.networks.task import Task, fit, trained

CLASSES, BINS, SIZE = 10, 8, 96
STRIDES = (8, 16)
LEAST_SCORE, MOST_BOXES = 0.01, 50


def conv(channels: int, out: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Conv, batch norm, SiLU."""
    return nn.Sequential(
        nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(out), nn.SiLU()
    )


class Bottleneck(nn.Module):
    """Half of the channels go through two convs with a skip; both halves and the result are mixed."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.enter, self.first, self.second = conv(channels, channels, 1), conv(half, half), conv(half, half)
        self.leave = conv(channels + half, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.enter(x).chunk(2, 1)
        return self.leave(torch.cat([a, b, b + self.second(self.first(b))], 1))


class Head(nn.Module):
    """Of each place the distributions of four distances, and the logits of the classes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.box = nn.Sequential(conv(channels, 32), nn.Conv2d(32, 4 * BINS, 1))
        self.score = nn.Sequential(conv(channels, 32), nn.Conv2d(32, CLASSES, 1))
        nn.init.constant_(self.score[1].bias, -4.0)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.box(x).flatten(2), self.score(x).flatten(2)


class Detector(nn.Module):
    """Images (batch, 1, 96, 96) to boxes and scores (batch, 4 + classes, places); in training the raw head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(1, 16, 3, 2), conv(16, 32, 3, 2), Bottleneck(32))
        self.third = nn.Sequential(conv(32, 48, 3, 2), Bottleneck(48))
        self.fourth = nn.Sequential(conv(48, 64, 3, 2), Bottleneck(64))
        self.up = nn.Upsample(scale_factor=2)
        self.merge_up = conv(64 + 48, 48)
        self.down = conv(48, 48, 3, 2)
        self.merge_down = conv(48 + 64, 64)
        self.heads = nn.ModuleList([Head(48), Head(64)])
        self.register_buffer("bins", torch.arange(BINS, dtype=torch.float32))
        self.register_buffer("centres", centres())
        self.register_buffer("strides", strides())

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        third = self.third(self.stem(x))
        fourth = self.fourth(third)
        fine = self.merge_up(torch.cat([self.up(fourth), third], 1))
        coarse = self.merge_down(torch.cat([self.down(fine), fourth], 1))
        found = [head(y) for head, y in zip(self.heads, (fine, coarse), strict=True)]
        sides, logits = (torch.cat(parts, 2) for parts in zip(*found, strict=True))
        if self.training:
            return sides, logits
        return torch.cat([self.decode(sides), logits.sigmoid()], 1)

    def decode(self, sides: torch.Tensor) -> torch.Tensor:
        """Distributions (batch, 4 * bins, places) to x1, y1, x2, y2 in pixels, (batch, 4, places)."""
        share = sides.unflatten(1, (4, BINS)).softmax(2)
        far = torch.einsum("bskp,k->bsp", share, self.bins) * self.strides
        return torch.cat([self.centres - far[:, :2], self.centres + far[:, 2:]], 1)


def centres() -> torch.Tensor:
    """Of every place, (2, places), x and y in pixels."""
    parts = []
    for stride in STRIDES:
        line = (torch.arange(SIZE // stride) + 0.5) * stride
        y, x = torch.meshgrid(line, line, indexing="ij")
        parts.append(torch.stack([x, y]).flatten(1))
    return torch.cat(parts, 1)


def strides() -> torch.Tensor:
    """Pixels of a cell at every place, (places,)."""
    return torch.cat([torch.full(((SIZE // stride) ** 2,), float(stride)) for stride in STRIDES])


class Loss:
    """What training makes small: wrong classes, boxes beside the true ones, distributions beside the true distances."""

    def __init__(self, model: Detector, most: int = 8) -> None:
        self.model, self.most = model, most

    def __call__(
        self, outputs: tuple[torch.Tensor, torch.Tensor], true: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """Of raw heads, and true boxes (batch, most, 4) with classes (batch, most), -1 where there is none."""
        sides, logits = outputs
        boxes, classes = true
        decoded = self.model.decode(sides).transpose(1, 2)  # (batch, places, 4)
        wanted, chosen, worth = self._assign(decoded.detach(), logits.detach(), boxes, classes)
        total = worth.sum().clamp_min(1.0)
        truth = torch.zeros_like(logits)
        row, place = chosen.nonzero(as_tuple=True)
        which = wanted[row, place]
        truth[row, classes[row, which], place] = worth[row, place]
        score = F.binary_cross_entropy_with_logits(logits, truth, reduction="sum") / total
        got, true_boxes, weight = decoded[row, place], boxes[row, which], worth[row, place]
        box = (generalised(got, true_boxes) * weight).sum() / total
        return score + 5.0 * box + self._distances(sides, true_boxes, weight, row, place) / total

    def _assign(
        self, decoded: torch.Tensor, logits: torch.Tensor, boxes: torch.Tensor, classes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For each place its true box, whether it has one, and what it counts; (batch, places) all."""
        centre = self.model.centres.T  # (places, 2)
        inside = torch.cat([centre - boxes[:, :, None, :2], boxes[:, :, None, 2:] - centre], -1).amin(-1) > 0
        inside &= (classes >= 0)[..., None]  # (batch, most, places)
        said = logits.sigmoid().gather(1, classes.clamp_min(0)[..., None].expand(-1, -1, logits.shape[2]))
        cover = overlaps(boxes, decoded)
        fit = torch.where(inside, said.sqrt() * cover**4 + 1e-9, 0.0)
        least = fit.topk(self.most, -1).values[..., -1:]
        fit = torch.where(fit >= least, fit, 0.0)
        best, wanted = (torch.where(fit > 0, cover + 1e-6, 0.0)).max(1)
        most_fit, most_cover = (
            fit.amax(-1, keepdim=True).clamp_min(1e-9),
            (cover * (fit > 0)).amax(-1, keepdim=True),
        )
        worth = (fit / most_fit * most_cover).gather(1, wanted[:, None])[:, 0]
        return wanted, best > 0, torch.where(best > 0, worth, 0.0)

    def _distances(
        self,
        sides: torch.Tensor,
        boxes: torch.Tensor,
        weight: torch.Tensor,
        row: torch.Tensor,
        place: torch.Tensor,
    ) -> torch.Tensor:
        """Cross entropy with the two whole cells around each true distance."""
        centre, stride = self.model.centres.T[place], self.model.strides[place][:, None]
        far = torch.cat([centre - boxes[:, :2], boxes[:, 2:] - centre], 1) / stride
        far = far.clamp(0, BINS - 1.01)
        low = far.long()
        log = sides.unflatten(1, (4, BINS)).log_softmax(2)[row, :, :, place]  # (n, 4, bins)
        above = far - low
        found = log.gather(2, low[..., None])[..., 0] * (1 - above)
        found = found + log.gather(2, low[..., None] + 1)[..., 0] * above
        return -(found.mean(1) * weight).sum()


def generalised(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """1 - GIoU of pairs (n, 4)."""
    low, high = torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])
    shared = (high - low).clamp_min(0).prod(1)
    union = sum((x[:, 2:] - x[:, :2]).clamp_min(0).prod(1) for x in (a, b)) - shared
    hull = (torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])).prod(1)
    return 1 - shared / union.clamp_min(1e-9) + (hull - union) / hull.clamp_min(1e-9)


def detections(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Boxes (n, 4), scores (n,) and classes (n,) of one image's output (4 + classes, places), after NMS."""
    scores, classes = output[4:].max(0)
    kept = scores > LEAST_SCORE
    boxes, scores, classes = output[:4, kept].T, scores[kept], classes[kept]
    chosen = suppress(boxes, scores, classes)[:MOST_BOXES]
    return boxes[chosen], scores[chosen], classes[chosen]


def matches(outputs: torch.Tensor, true: tuple[torch.Tensor, torch.Tensor]) -> list[Matched]:
    """What each image adds to the mean average precision."""
    return [
        match(*detections(output), boxes[classes >= 0], classes[classes >= 0], CLASSES)
        for output, boxes, classes in zip(outputs, *true, strict=True)
    ]


def labelled(some: Sequence[Scene], batch: int = 32) -> list:
    """Batches of images with boxes (batch, most, 4) and classes (batch, most), -1 where there is none."""
    boxes, classes = torch.zeros(len(some), MOST, 4), torch.full((len(some), MOST), -1)
    for row, scene in enumerate(some):
        boxes[row, : len(scene.boxes)], classes[row, : len(scene.classes)] = scene.boxes, scene.classes
    true = zip(boxes.split(batch), classes.split(batch), strict=True)
    return list(zip(images_of(some).split(batch), true, strict=True))


def detector() -> Task:
    """Mean average precision over the thresholds 0.50 to 0.95 on 500 scenes."""

    def train(model: nn.Module) -> None:
        everything = scenes(3000, SIZE, 0)

        def shuffled(epoch: int) -> list:
            order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(epoch)).tolist()
            return labelled([everything[index] for index in order], 16)

        fit(model, shuffled, Loss(model), 5, 3e-3)

    return Task(
        trained("detector", Detector(), train),
        [images for images, _ in labelled(scenes(256, SIZE, 1, "calibration"))],
        hs.SetMetric(labelled(scenes(500, SIZE, 2, "test")), matches, mean_average_precision),
    )
