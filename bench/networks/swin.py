"""A Swin-like network: attention in shifted windows, patch merging (Liu et al. 2021)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class WindowAttention(nn.Module):
    """Attention within windows of ``size`` x ``size`` tokens, with a learned bias on the position."""

    def __init__(self, width: int, heads: int, size: int, shift: int) -> None:
        super().__init__()
        self.heads, self.size, self.shift = heads, size, shift
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.bias = nn.Parameter(0.02 * torch.randn(heads, size * size, size * size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, height, width, channels = x.shape
        s = self.size
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        x = x.view(batch, height // s, s, width // s, s, channels).permute(0, 1, 3, 2, 4, 5)
        windows = x.reshape(-1, s * s, channels)
        q, k, v = (
            self.qkv(windows).reshape(-1, s * s, 3, self.heads, channels // self.heads).permute(2, 0, 3, 1, 4)
        )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        y = self.proj(y.transpose(1, 2).reshape(-1, s * s, channels))
        y = y.view(batch, height // s, width // s, s, s, channels).permute(0, 1, 3, 2, 4, 5)
        y = y.reshape(batch, height, width, channels)
        return torch.roll(y, (self.shift, self.shift), (1, 2)) if self.shift else y


class SwinBlock(nn.Module):
    """Pre-norm window attention and MLP."""

    def __init__(self, width: int, heads: int, size: int, shift: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = WindowAttention(width, heads, size, shift)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    """2x2 neighbours side by side, then a linear to twice the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.reduction(self.norm(torch.cat(parts, -1)))


class SwinLike(nn.Module):
    """Two stages of two blocks on 56x56 images in 4x4 patches, or any multiple of 56."""

    def __init__(self, width: int = 48, channels: int = 3, classes: int = 100, window: int = 7) -> None:
        super().__init__()
        self.patch = nn.Conv2d(channels, width, 4, 4)
        self.norm0 = nn.LayerNorm(width)
        self.stage1 = nn.Sequential(SwinBlock(width, 3, window, 0), SwinBlock(width, 3, window, window // 2))
        self.merge = PatchMerging(width)
        self.stage2 = nn.Sequential(SwinBlock(2 * width, 6, window, 0), SwinBlock(2 * width, 6, window, 0))
        self.norm = nn.LayerNorm(2 * width)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm0(self.patch(x).permute(0, 2, 3, 1))
        x = self.stage2(self.merge(self.stage1(x)))
        return self.head(self.norm(x).mean((1, 2)))
