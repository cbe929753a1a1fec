"""An EfficientNet-like network: inverted residuals with SiLU and squeeze-and-excite (Tan & Le 2019)."""

from __future__ import annotations

import torch
from torch import nn

from bench.networks.mobilenet import SqueezeExcite


class MBConv(nn.Module):
    """Expansion, depthwise, squeeze-and-excite, projection, all with SiLU."""

    def __init__(self, channels: int, out: int, stride: int, kernel: int = 3, expansion: int = 4) -> None:
        super().__init__()
        hidden = channels * expansion
        self.expand = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.SiLU()
        )
        self.depthwise = nn.Sequential(
            nn.Conv2d(hidden, hidden, kernel, stride, kernel // 2, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.SiLU(),
        )
        self.excite = SqueezeExcite(hidden, nn.Sigmoid)
        self.project = nn.Sequential(nn.Conv2d(hidden, out, 1, bias=False), nn.BatchNorm2d(out))
        self.residual = stride == 1 and channels == out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.project(self.excite(self.depthwise(self.expand(x))))
        return x + y if self.residual else y


class EfficientNetLike(nn.Module):
    """Stem, seven MBConv blocks, head; ``width`` scales it."""

    def __init__(self, width: int = 16, channels: int = 3, classes: int = 100) -> None:
        super().__init__()
        w = width
        self.stem = nn.Sequential(nn.Conv2d(channels, w, 3, 2, 1, bias=False), nn.BatchNorm2d(w), nn.SiLU())
        self.blocks = nn.Sequential(
            MBConv(w, w, 1),
            MBConv(w, 2 * w, 2),
            MBConv(2 * w, 2 * w, 1),
            MBConv(2 * w, 4 * w, 2, 5),
            MBConv(4 * w, 4 * w, 1, 5),
            MBConv(4 * w, 6 * w, 2),
            MBConv(6 * w, 6 * w, 1),
        )
        self.head = nn.Sequential(nn.Conv2d(6 * w, 20 * w, 1, bias=False), nn.BatchNorm2d(20 * w), nn.SiLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(20 * w, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.flatten(self.pool(self.head(self.blocks(self.stem(x)))), 1))
