"""Mean average precision of boxes, as COCO counts it, and the suppression of those that others cover.

For every class and each of the thresholds 0.50, 0.55, ..., 0.95 boxes are matched in order of their scores, each with
the true box that it covers best and that no other has; average precision is the mean of the precision at 101 recalls,
where precision is the best at that recall or a higher one.

Source: Lin et al., Microsoft COCO (2014), and its detection evaluation: https://cocodataset.org/#detection-eval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

THRESHOLDS = torch.linspace(0.5, 0.95, 10)
RECALLS = torch.linspace(0, 1, 101, dtype=torch.float64)


@dataclass(frozen=True)
class Matched:
    """What an image adds: of each detection its score (n,), class (n,) and hits (n, thresholds); true boxes a class."""

    scores: torch.Tensor
    classes: torch.Tensor
    hits: torch.Tensor
    wanted: torch.Tensor


def overlaps(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Intersection over union of boxes (..., n, 4) and (..., m, 4), x1, y1, x2, y2: (..., n, m); 0 of empty ones.

    >>> overlaps(torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[1.0, 0, 3, 2]]))  # 2 / (4 + 4 - 2)
    tensor([[0.3333]])
    """
    low = torch.maximum(a[..., :, None, :2], b[..., None, :, :2])
    high = torch.minimum(a[..., :, None, 2:], b[..., None, :, 2:])
    shared = (high - low).clamp_min(0).prod(-1)
    areas = [(x[..., 2:] - x[..., :2]).clamp_min(0).prod(-1) for x in (a, b)]
    return shared / (areas[0][..., :, None] + areas[1][..., None, :] - shared).clamp_min(1e-9)


def suppress(
    boxes: torch.Tensor, scores: torch.Tensor, classes: torch.Tensor, threshold: float = 0.6
) -> torch.Tensor:
    """Places of the boxes that no better one of their class covers by more than ``threshold``, best first."""
    order = scores.argsort(descending=True, stable=True)
    covered = overlaps(boxes[order], boxes[order]) > threshold
    covered &= classes[order][:, None] == classes[order][None]
    kept: list[int] = []
    gone = torch.zeros(len(order), dtype=torch.bool)
    for place in range(len(order)):
        if not gone[place]:
            kept.append(place)
            gone |= covered[place]
    return order[kept]


def match(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    classes: torch.Tensor,
    true_boxes: torch.Tensor,
    true_classes: torch.Tensor,
    count: int,
) -> Matched:
    """Hold an image's detections (n) to its true boxes (m) of ``count`` classes."""
    order = scores.argsort(descending=True, stable=True)
    boxes, scores, classes = boxes[order], scores[order], classes[order]
    covers = overlaps(boxes, true_boxes) * (classes[:, None] == true_classes[None])
    free = torch.ones(len(true_boxes), len(THRESHOLDS), dtype=torch.bool)
    hits = torch.zeros(len(boxes), len(THRESHOLDS), dtype=torch.bool)
    if len(true_boxes):
        for place, cover in enumerate(covers):
            best, which = (cover[:, None] * free).max(0)  # for each threshold
            hits[place] = best >= THRESHOLDS
            free[which, torch.arange(len(THRESHOLDS))] &= ~hits[place]
    return Matched(scores, classes, hits, torch.bincount(true_classes, minlength=count))


def mean_average_precision(images: Sequence[Matched]) -> float:
    """Over thresholds and the classes that are there; 0 where nothing is."""
    scores, classes = (
        torch.cat([getattr(image, name) for image in images]) for name in ("scores", "classes")
    )
    hits, wanted = torch.cat([image.hits for image in images]), sum(image.wanted for image in images)
    order = scores.argsort(descending=True, stable=True)
    classes, hits = classes[order], hits[order]
    found = [
        average_precision(hits[classes == index], int(total))
        for index, total in enumerate(wanted.tolist())  # type: ignore[union-attr]
        if total
    ]
    return float(torch.stack(found).mean()) if found else 0.0


def average_precision(hits: torch.Tensor, wanted: int) -> torch.Tensor:
    """Of one class, with ``hits`` (n, thresholds) in order of score: (thresholds,).

    >>> average_precision(torch.tensor([[True], [False]]), 1)
    tensor([1.], dtype=torch.float64)
    """
    right = hits.double().cumsum(0)
    precision = right / torch.arange(1, len(hits) + 1, dtype=torch.float64)[:, None]
    best = precision.flip(0).cummax(0).values.flip(0) if len(hits) else precision
    recall = (right / wanted).T.contiguous()
    places = torch.searchsorted(recall, RECALLS.expand(len(recall), -1).contiguous() - 1e-12)
    padded = torch.cat([best, torch.zeros(1, best.shape[1], dtype=torch.float64)])
    return padded.T.gather(1, places).mean(1)
