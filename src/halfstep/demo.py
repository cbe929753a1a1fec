"""The demonstration: a small residual network on scikit-learn's handwritten digits, trained here in seconds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from halfstep.errors import DataError
from halfstep.progress import track


class ResidualBlock(nn.Module):
    """Two 3x3 convs with batch norm, and a skip."""

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.skip = (
            nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
            if stride != 1 or channels != out
            else nn.Identity()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, channels, h, w) -> (batch, out, h / stride, w / stride)."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.skip(x)
        return torch.relu(y)


class DigitsNet(nn.Module):
    """A residual network for 8x8 images of one channel, ten classes.

    Args:
        width: channels of the first layers; 16 make about 80,000 parameters, 12 about 45,000.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.block1 = ResidualBlock(width, width)
        self.block2 = ResidualBlock(width, 2 * width, 2)
        self.block3 = ResidualBlock(2 * width, 4 * width, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.1)
        self.fc = nn.Linear(4 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, 1, 8, 8) -> logits (batch, 10)."""
        x = self.block3(self.block2(self.block1(self.stem(x))))
        logits: torch.Tensor = self.fc(self.dropout(torch.flatten(self.pool(x), 1)))
        return logits


@dataclass(frozen=True)
class Digits:
    """scikit-learn's 1,797 digits, split once and for all.

    Attributes:
        train_images, train_labels: 1,197 images (n, 1, 8, 8) of floats from 0 to 1, and their classes.
        test_images, test_labels: the other 600.
    """

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor

    def test_batches(self, size: int = 200) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The test set as (images, labels) batches."""
        return list(zip(self.test_images.split(size), self.test_labels.split(size), strict=True))

    def training_batches(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The training set as (images, labels) batches."""
        return list(zip(self.train_images.split(64), self.train_labels.split(64), strict=True))

    def calibration_batches(self, count: int = 256, size: int = 64) -> list[torch.Tensor]:
        """The first ``count`` training images as batches."""
        return list(self.train_images[:count].split(size))


def load_digits() -> Digits:
    """Read the digits.

    Raises:
        DataError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise DataError("the demo needs scikit-learn's digits: pip install 'halfstep[demo]'") from error
    bunch = load()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return Digits(images[:1197], labels[:1197], images[1197:], labels[1197:])


def train_digits(digits: Digits, epochs: int = 15, width: int = 16) -> DigitsNet:
    """A trained network; takes seconds on two cores."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DigitsNet(width)
        optimizer = torch.optim.SGD(
            model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
        count = len(digits.train_images)
        rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-count // 64))
        model.train()
        for _ in track(range(epochs), "training a float network on digits"):
            for index in torch.randperm(count).split(64):
                loss = nn.functional.cross_entropy(
                    model(digits.train_images[index]), digits.train_labels[index]
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rate.step()
    return model.eval()
