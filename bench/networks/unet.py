"""A U-Net: skip concats, transposed convs on one way up, bilinear resizing on the other (Ronneberger et al. 2015)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


def double_conv(channels: int, out: int) -> nn.Sequential:
    """Two 3x3 convs with batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(channels, out, 3, padding=1, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(inplace=True),
        nn.Conv2d(out, out, 3, padding=1, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(inplace=True),
    )


class UNet(nn.Module):
    """Two levels; the output has the input's size and ``classes`` channels."""

    def __init__(self, width: int = 16, channels: int = 3, classes: int = 2) -> None:
        super().__init__()
        w = width
        self.down1, self.down2, self.bottom = (
            double_conv(channels, w),
            double_conv(w, 2 * w),
            double_conv(2 * w, 4 * w),
        )
        self.pool = nn.MaxPool2d(2)
        self.up2 = nn.ConvTranspose2d(4 * w, 2 * w, 2, 2)
        self.conv2 = double_conv(4 * w, 2 * w)
        self.conv1 = double_conv(3 * w, w)
        self.head = nn.Conv2d(w, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.down1(x)
        b = self.down2(self.pool(a))
        c = self.bottom(self.pool(b))
        b = self.conv2(torch.cat([self.up2(c), b], 1))
        b = F.interpolate(b, scale_factor=2.0, mode="bilinear", align_corners=False)
        return self.head(self.conv1(torch.cat([b, a], 1)))
