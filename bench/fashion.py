"""Fashion-MNIST and networks trained on it; weights are cached in ``bench/cache``, outside git.

The images come from Debian's package: ``apt-get install dataset-fashion-mnist``.
"""

from __future__ import annotations

import gzip
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bench.networks.mobilenet import SmallMobileNet
from bench.networks.resnet import SmallResNet
from bench.networks.vit import SmallViT

FOLDER = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
CACHE = Path(__file__).parent / "cache"
NETWORKS: dict[str, type[nn.Module]] = {"resnet": SmallResNet, "vit": SmallViT, "mobilenet": SmallMobileNet}
EPOCHS = {"resnet": 5, "vit": 10, "mobilenet": 4}


@dataclass(frozen=True)
class Fashion:
    """Images (n, 1, 28, 28), normalised to mean 0 and deviation 1, and their classes."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor

    def test(self, count: int = 10_000, batch: int = 500) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(
            zip(self.test_images[:count].split(batch), self.test_labels[:count].split(batch), strict=True)
        )

    def train(
        self, count: int = 60_000, batch: int = 128, start: int = 0
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        stop = start + count
        images, labels = self.train_images[start:stop], self.train_labels[start:stop]
        return list(zip(images.split(batch), labels.split(batch), strict=True))

    def calibration(self, count: int = 512, batch: int = 64) -> list[torch.Tensor]:
        return list(self.train_images[:count].split(batch))


def load() -> Fashion:
    """Read the four files."""
    if not FOLDER.exists():
        raise SystemExit(f"{FOLDER} is missing: apt-get install dataset-fashion-mnist, or set FASHION_MNIST")

    def read(name: str, header: int) -> np.ndarray:
        with gzip.open(FOLDER / name) as file:
            return np.frombuffer(file.read(), np.uint8, offset=header)

    def images(name: str) -> torch.Tensor:
        pixels = torch.from_numpy(read(name, 16).reshape(-1, 1, 28, 28).copy()).float()
        return (pixels / 255 - 0.286) / 0.353

    def labels(name: str) -> torch.Tensor:
        return torch.from_numpy(read(name, 8).astype(np.int64))

    return Fashion(
        images("train-images-idx3-ubyte.gz"),
        labels("train-labels-idx1-ubyte.gz"),
        images("t10k-images-idx3-ubyte.gz"),
        labels("t10k-labels-idx1-ubyte.gz"),
    )


def trained(name: str, data: Fashion, seed: int = 0) -> nn.Module:
    """A network of :data:`NETWORKS`, trained once a seed."""
    torch.manual_seed(seed)
    model = NETWORKS[name]()
    file = CACHE / f"{name}-{seed}.safetensors"
    if file.exists():
        model.load_state_dict(load_file(file))
        return model.eval()
    CACHE.mkdir(exist_ok=True)
    train(model, data, EPOCHS[name], seed)
    save_file(model.state_dict(), file)
    return model.eval()


def train(model: nn.Module, data: Fashion, epochs: int, seed: int) -> None:
    """AdamW, one-cycle schedule, random flips; a line an epoch."""
    model.to(memory_format=torch.channels_last)  # depthwise convs train half again as fast
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.02)
    count, batch = len(data.train_images), 128
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, epochs * -(-count // batch))
    model.train()
    for epoch in range(epochs):
        total = 0.0
        for index in torch.randperm(count, generator=generator).split(batch):
            images = data.train_images[index].to(memory_format=torch.channels_last)
            if torch.rand((), generator=generator) < 0.5:
                images = images.flip(-1)
            loss = nn.functional.cross_entropy(model(images), data.train_labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(index)
        print(f"epoch {epoch + 1} of {epochs}: training loss {total / count:.4f}", flush=True)
    model.to(memory_format=torch.contiguous_format)


if __name__ == "__main__":
    fashion = load()
    for network in NETWORKS:
        model = trained(network, fashion)
        with torch.no_grad():
            hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in fashion.test())
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{network}: {parameters:,} parameters, {hits / 10_000:.2%} of the test images")
