"""Small networks for the repairs' tests, with inputs and observed models."""

import copy
from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

import halfstep as hs


class Net(nn.Module):
    """Layers by name and a forward that uses them."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.body = forward

    def forward(self, x):
        return self.body(self, x)


def conv(inputs, outputs, size=3, **options):
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


def chain():
    """Conv, ReLU, strided conv, leaky ReLU, pool, conv: two pairs."""
    return Net(
        lambda m, x: m.c(F.max_pool2d(F.leaky_relu(m.b(F.relu(m.a(x)))), 2)),
        a=conv(3, 8),
        b=conv(8, 6, stride=2),
        c=conv(6, 4),
    )


def depthwise():
    return Net(
        lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))),
        a=conv(3, 8, 1),
        b=conv(8, 16, groups=8),
        c=conv(16, 4, 1),
    )


def grouped():
    return Net(lambda m, x: m.b(F.relu(m.a(x))), a=conv(3, 8), b=conv(8, 6, groups=2))


def residual():
    return Net(
        lambda m, x: m.fc(F.relu(m.c(F.relu(m.b(y := F.relu(m.a(x))))) + y).mean((2, 3))),
        a=conv(3, 8),
        b=conv(8, 6),
        c=conv(6, 8),
        fc=nn.Linear(8, 5),
    )


def flattened():
    return Net(lambda m, x: m.fc(F.relu(m.a(x)).flatten(1)), a=conv(3, 4, stride=4), fc=nn.Linear(16, 5))


def tokens():
    """Layer norm and linear layers on sequences: patches of the image."""
    return Net(
        lambda m, x: m.b(F.relu(m.a(m.norm(x.flatten(2))))),
        norm=nn.LayerNorm(64),
        a=nn.Linear(64, 12),
        b=nn.Linear(12, 7),
    )


def heads(x):
    """(batch, tokens, width) as (batch, 4 heads, tokens, part)."""
    return x.unflatten(2, (4, -1)).transpose(1, 2)


def joined(x):
    return x.transpose(1, 2).flatten(2)


def attention():
    """Queries, keys and values each from a layer of its own; attention in one operator."""
    return Net(
        lambda m, x: m.out(
            joined(F.scaled_dot_product_attention(*(heads(part(x.flatten(2))) for part in (m.q, m.k, m.v))))
        ),
        q=nn.Linear(64, 16),
        k=nn.Linear(64, 16),
        v=nn.Linear(64, 16),
        out=nn.Linear(16, 5),
    )


def _packed(m, x):
    q, k, v = m.qkv(x.flatten(2)).unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4)
    return m.out(joined((q @ k.transpose(-2, -1)).softmax(-1) @ v))


def packed_attention():
    """Queries, keys and values from one layer; attention by matrix products."""
    return Net(_packed, qkv=nn.Linear(64, 48), out=nn.Linear(16, 5))


def split():
    """Half of a layer's channels gate what another half, read twice, becomes."""

    def forward(m, x):
        gate, value = m.a(x).chunk(2, 1)
        value = F.relu(value)
        return m.b(torch.sigmoid(gate) * value) + m.c(value)

    return Net(forward, a=conv(3, 16), b=conv(8, 4), c=conv(8, 4))


HOMOGENEOUS = [
    chain,
    depthwise,
    grouped,
    residual,
    flattened,
    tokens,
    attention,
    packed_attention,
    split,
]


def images(count=16, seed=0):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def built(make, seed=0):
    torch.manual_seed(seed)
    return make().eval()


def calibrated(model, bits=4, calibrator=None, **options):
    x = images()
    q = hs.prepare(model, x[:2], hs.Recipe.uniform(bits, 8, ends=None, **options))
    hs.observe(q, [x[:8], x[8:]])
    hs.calibrate(q, calibrator or hs.MSE(), hs.MSE())
    return q


@cache
def _once(make):
    return calibrated(built(make))


def ready(make):
    """A calibrated network of its own; captured once."""
    return copy.deepcopy(_once(make))


PROTOTYPES = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def labelled(count, seed=0):
    """Images of five classes: a prototype each, and as much noise; with the classes."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(5, (count,), generator=generator)
    return PROTOTYPES[classes] + torch.randn(count, 3, 8, 8, generator=generator), classes


@cache
def trained(make, steps=80):
    """A network that tells these classes apart; its logits are (batch, 5)."""
    model = built(make)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for step in range(steps):
        x, classes = labelled(32, 1000 + step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), classes).backward()
        optimizer.step()
    return model
