"""A network that trains in a moment, with a task that it can learn."""

import itertools

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import halfstep as hs


class Net(nn.Module):
    """A conv with batch norm, a conv without, a linear: 1,000 parameters for 1x8x8 images of four classes."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.fc = nn.Linear(8 * 4, 4)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(torch.relu(self.conv2(x)).flatten(1))


def task(count=256, size=32, seed=0):
    """Images whose class is the quadrant that is brighter; as (inputs, labels) batches."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=generator)
    images = torch.randn(count, 1, 8, 8, generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = 4 * (label // 2), 4 * (label % 2)
        image[0, row : row + 4, column : column + 4] += 1.0
    return list(zip(images.split(size), labels.split(size), strict=True))


def trained_net(seed=0, epochs=4):
    """The network after a few epochs in float."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Net()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        for _ in range(epochs):
            for images, labels in task():
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(images), labels).backward()
                optimizer.step()
        return net.eval()


def calibrated(net, weights=8, activations=8, recipe=None):
    """The network quantized, with ranges by the largest value."""
    q = hs.prepare(net, torch.zeros(2, 1, 8, 8), recipe or hs.Recipe.uniform(weights, activations, ends=None))
    hs.observe(q, [images for images, _ in task()])
    hs.calibrate(q)
    return q


class Killing:
    """A loss that is interrupted at a step; by its own account when that is makes no difference."""

    def __init__(self, step=-1):
        self.step, self.calls = step, itertools.count()

    def __getstate__(self):
        return {}

    def __call__(self, outputs, labels):
        if next(self.calls) == self.step:
            raise KeyboardInterrupt
        return cross_entropy(outputs, labels)
