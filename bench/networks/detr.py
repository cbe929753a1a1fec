"""A small DETR: a convolutional stem, an encoder over its cells, queries that look for boxes, nothing behind them.

Layers are torch's own ``nn.TransformerEncoderLayer`` and ``nn.TransformerDecoderLayer``, as people use them. Every
query has a place of its own on the image, from which it says where its box is; a scene's true boxes are matched to
queries one to one, after each layer of the decoder.

Source: Carion et al., End-to-End Object Detection with Transformers (2020); places and the focal loss as in Zhu et al.,
Deformable DETR (2021).
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn import functional as F

import halfstep as hs
from bench.average_precision import Matched, match, mean_average_precision
from bench.networks.detector import CLASSES, MOST_BOXES, SIZE, Bottleneck, conv, generalised, labelled
from bench.networks.scenes import scenes
from bench.networks.task import Task, fit, trained

WIDTH, HEADS, STRIDE = 64, 4, 16
QUERIES = 5  # in a row and in a column


class Detr(nn.Module):
    """Images (batch, 1, 96, 96) to boxes in pixels and scores (batch, 4 + classes, queries).

    In training after each layer of the decoder boxes (centre and size as shares of the image) and logits,
    (layers, batch, queries, 4 + classes).
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            conv(1, 16, 3, 2), conv(16, 32, 3, 2), Bottleneck(32), conv(32, 48, 3, 2), conv(48, WIDTH, 3, 2)
        )
        options = {"dropout": 0.0, "activation": "gelu", "batch_first": True}
        self.encoder = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, **options) for _ in range(2)
        )
        self.decoder = nn.ModuleList(
            nn.TransformerDecoderLayer(WIDTH, HEADS, 2 * WIDTH, **options) for _ in range(3)
        )
        self.cells = nn.Parameter(0.02 * torch.randn(1, (SIZE // STRIDE) ** 2, WIDTH))
        self.queries = nn.Parameter(torch.randn(1, QUERIES**2, WIDTH))
        line = (torch.arange(QUERIES) + 0.5) / QUERIES
        self.places = nn.Parameter(torch.cartesian_prod(line, line).logit())
        self.box = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4))
        self.score = nn.Linear(WIDTH, CLASSES)
        nn.init.constant_(self.score.bias, -4.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        cells = self.stem(x).flatten(2).transpose(1, 2) + self.cells
        for layer in self.encoder:
            cells = layer(cells)
        queries = self.queries.expand(x.shape[0], -1, -1)
        found = []
        for layer in self.decoder:
            queries = layer(queries, cells)
            if self.training:
                found.append(self._said(queries))
        if self.training:
            return torch.stack(found)
        boxes, logits = self._said(queries).split([4, CLASSES], -1)
        centre, size = boxes.chunk(2, -1)
        corners = torch.cat([centre - size / 2, centre + size / 2], -1) * SIZE
        return torch.cat([corners, logits.sigmoid()], -1).transpose(1, 2)

    def _said(self, queries: torch.Tensor) -> torch.Tensor:
        centre, size = self.box(queries).chunk(2, -1)
        return torch.cat([(centre + self.places).sigmoid(), size.sigmoid(), self.score(queries)], -1)


def loss(outputs: torch.Tensor, true: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Of every layer's answers, with true boxes (batch, most, 4) in pixels and classes (batch, most), -1 for none."""
    return torch.stack([_layer_loss(layer, *true) for layer in outputs]).sum()


def _layer_loss(said: torch.Tensor, boxes: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    got, logits = said.split([4, CLASSES], -1)
    wanted = torch.cat([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], -1) / SIZE
    with torch.no_grad():
        far = (got[:, :, None] - wanted[:, None]).abs().sum(-1)  # (batch, queries, most)
        pairs = torch.broadcast_tensors(got[:, :, None], wanted[:, None])
        apart = generalised(*(_corners(pair).flatten(0, 2) for pair in pairs)).view_as(far)
        says = logits.sigmoid().gather(2, classes.clamp_min(0)[:, None].expand(-1, logits.shape[1], -1))
        cost = 5 * far + 2 * apart - 2 * says
    rows, queries, which = [], [], []
    for row, there in enumerate(classes >= 0):
        chosen, truth = linear_sum_assignment(cost[row, :, there].numpy())
        rows += [row] * len(chosen)
        queries += chosen.tolist()
        which += there.nonzero()[:, 0][truth].tolist()
    count = max(1, len(rows))
    truth = torch.zeros_like(logits)
    truth[rows, queries, classes[rows, which]] = 1.0
    share = logits.sigmoid()
    hard = torch.where(truth > 0, 0.25 * (1 - share) ** 2, 0.75 * share**2)
    score = (hard * F.binary_cross_entropy_with_logits(logits, truth, reduction="none")).sum()
    mine, theirs = got[rows, queries], wanted[rows, which]
    box = 5 * (mine - theirs).abs().sum() + 2 * generalised(_corners(mine), _corners(theirs)).sum()
    return (2 * score + box) / count


def _corners(boxes: torch.Tensor) -> torch.Tensor:
    centre, size = boxes.chunk(2, -1)
    return torch.cat([centre - size / 2, centre + size / 2], -1)


def matches(outputs: torch.Tensor, true: tuple[torch.Tensor, torch.Tensor]) -> list[Matched]:
    """What each image adds to the mean average precision: every query may say every class, the likeliest count."""
    found = []
    for output, boxes, classes in zip(outputs, *true, strict=True):
        scores, places = output[4:].flatten().topk(MOST_BOXES)
        queries = places % output.shape[1]
        there = classes >= 0
        found.append(
            match(
                output[:4, queries].T,
                scores,
                places // output.shape[1],
                boxes[there],
                classes[there],
                CLASSES,
            )
        )
    return found


def detr() -> Task:
    """Mean average precision over the thresholds 0.50 to 0.95 on 500 scenes."""

    def train(model: nn.Module) -> None:
        everything = scenes(4000, SIZE, 0)

        def shuffled(epoch: int) -> list:
            order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(epoch)).tolist()
            return labelled([everything[index] for index in order], 32)

        fit(model, shuffled, loss, 20, 1e-3)

    return Task(
        trained("detr", Detr(), train),
        [images for images, _ in labelled(scenes(256, SIZE, 1, "calibration"))],
        hs.SetMetric(labelled(scenes(500, SIZE, 2, "test")), matches, mean_average_precision),
        transformer=True,
    )
