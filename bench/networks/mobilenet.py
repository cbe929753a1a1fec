"""A MobileNet-like network: inverted residuals with depthwise convs, ReLU6, HardSwish, squeeze-and-excite."""

from __future__ import annotations

import torch
from torch import nn


class SqueezeExcite(nn.Module):
    """Channels scaled by a gate computed from their means."""

    def __init__(self, channels: int, gate: type[nn.Module] = nn.Hardsigmoid) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, channels // 4, 1)
        self.relu = nn.ReLU(inplace=True)
        self.expand = nn.Conv2d(channels // 4, channels, 1)
        self.gate = gate()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gate(self.expand(self.relu(self.reduce(self.pool(x)))))


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise 3x3, optional squeeze-and-excite, 1x1 projection."""

    def __init__(
        self,
        channels: int,
        out: int,
        stride: int,
        activation: type[nn.Module],
        excite: bool,
        expansion: int = 4,
    ) -> None:
        super().__init__()
        hidden = channels * expansion
        layers: list[nn.Module] = [
            nn.Conv2d(channels, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            activation(),
        ]
        layers += [
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            activation(),
        ]
        if excite:
            layers.append(SqueezeExcite(hidden))
        layers += [nn.Conv2d(hidden, out, 1, bias=False), nn.BatchNorm2d(out)]
        self.body = nn.Sequential(*layers)
        self.residual = stride == 1 and channels == out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x) if self.residual else self.body(x)


class SmallMobileNet(nn.Module):
    """About 100,000 parameters for 28x28 images of one channel, ten classes."""

    def __init__(self, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        w = width
        self.stem = nn.Sequential(nn.Conv2d(1, w, 3, 1, 1, bias=False), nn.BatchNorm2d(w), nn.Hardswish())
        self.blocks = nn.Sequential(
            InvertedResidual(w, w, 1, nn.ReLU6, excite=False),
            InvertedResidual(w, 2 * w, 2, nn.ReLU6, excite=False),
            InvertedResidual(2 * w, 2 * w, 1, nn.Hardswish, excite=True),
            InvertedResidual(2 * w, 3 * w, 2, nn.Hardswish, excite=True),
            InvertedResidual(3 * w, 3 * w, 1, nn.Hardswish, excite=False),
        )
        self.head = nn.Sequential(
            nn.Conv2d(3 * w, 8 * w, 1, bias=False), nn.BatchNorm2d(8 * w), nn.Hardswish()
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8 * w, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.flatten(self.pool(self.head(self.blocks(self.stem(x)))), 1))
