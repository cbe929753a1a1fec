"""Small networks with known faults."""

import torch
from torch import nn

import halfstep as hs

INPUTS = torch.randn(3000, 8, generator=torch.Generator().manual_seed(1))
FAULTS = ("2", "6")


class Attention(nn.Module):
    """Query, key and value read one input; a skip, and a shared output layer called twice."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 16)
        self.norm = nn.LayerNorm(16)
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.out = nn.Linear(16, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = self.embed(x.unflatten(1, (2, 4)))
        y = self.norm(x)
        weights = (self.query(y) @ self.key(y).transpose(1, 2)).softmax(-1)
        x = x + self.out(weights @ self.value(y))
        x = x + self.out(x)
        return self.head(x.mean(1))


def faulty():
    """Six linear layers, two of which a single range for the whole weight ruins: some rows are 20 times larger.

    The next layer's columns are as much smaller, so the float network is an ordinary one.
    """
    torch.manual_seed(0)
    layers = [nn.Linear(8, 24)]
    for _ in range(4):
        layers += [nn.ReLU(), nn.Linear(24, 24)]
    network = nn.Sequential(*layers, nn.ReLU(), nn.Linear(24, 3))
    with torch.no_grad():
        for layer in network:
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(2.2)
        for name in FAULTS:
            here, after = network[int(name)], network[int(name) + 2]
            here.weight[:2] *= 20
            here.bias[:2] *= 20
            after.weight[:, :2] /= 20
    return network


def calibrated(network, recipe=None, inputs=INPUTS):
    """A prepared, observed, calibrated model."""
    model = hs.prepare(network, inputs[:2], recipe)
    hs.observe(model, [inputs[:128]])
    hs.calibrate(model)
    return model


def weights_per_tensor():
    """A model of :func:`faulty` whose weights have one range each, of 6 bits."""
    return calibrated(faulty(), hs.Recipe.uniform(6, None, hs.PerTensor()))


def labelled(network, size=100, inputs=INPUTS):
    """Batches whose labels are the float network's own answers: its accuracy is 1."""
    with torch.no_grad():
        labels = network(inputs).argmax(1)
    return list(zip(inputs.split(size), labels.split(size), strict=True))
