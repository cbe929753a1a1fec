"""Every architecture with example inputs, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bench.networks.convnext import ConvNeXtLike
from bench.networks.efficientnet import EfficientNetLike
from bench.networks.mobilenet import SmallMobileNet
from bench.networks.resnet import ResNet18, SmallResNet, randomize_batch_norm
from bench.networks.sequence import GRUTagger, LSTMTagger, TwoTowers, bert
from bench.networks.swin import SwinLike
from bench.networks.unet import UNet
from bench.networks.vit import SmallViT


@dataclass(frozen=True)
class Entry:
    """How to build a network, and what to feed it: ``inputs(batch)``."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]


def _images(size: int, channels: int = 3) -> Callable[[int], torch.Tensor]:
    return lambda batch: torch.randn(batch, channels, size, size)


def _tokens(batch: int, length: int = 64) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.randint(0, 1000, (batch, length)),
        "attention_mask": (torch.arange(length) < length - 8).long().expand(batch, -1).clone(),
    }


CATALOGUE: dict[str, Entry] = {
    "resnet18": Entry(ResNet18, _images(224)),
    "small resnet": Entry(SmallResNet, _images(28, 1)),
    "mobilenet": Entry(SmallMobileNet, _images(28, 1)),
    "efficientnet-like": Entry(EfficientNetLike, _images(96)),
    "convnext-like": Entry(ConvNeXtLike, _images(96)),
    "vit": Entry(lambda: SmallViT(96, 8, 3, 96, 4, 3, 100), _images(96)),
    "small vit": Entry(lambda: SmallViT(patch=4, width=64, depth=4, heads=4), _images(28, 1)),
    "swin-like": Entry(SwinLike, _images(56)),
    "unet": Entry(UNet, _images(64)),
    "bert": Entry(bert, _tokens),
    "lstm": Entry(LSTMTagger, lambda batch: torch.randint(0, 100, (batch, 20))),
    "gru": Entry(GRUTagger, lambda batch: torch.randint(0, 100, (batch, 20))),
    "two towers": Entry(TwoTowers, lambda batch: (torch.randn(batch, 3, 32, 32), torch.randn(batch, 12))),
}


def build(name: str, seed: int = 0) -> nn.Module:
    """The network with random weights and the batch norm statistics of a trained one."""
    torch.manual_seed(seed)
    return randomize_batch_norm(CATALOGUE[name].build(), seed).eval()
