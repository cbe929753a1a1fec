"""Groups of layers with the same surroundings."""

import torch
from torch import nn

import halfstep as hs
from halfstep.ladder.alike import labels_of
from halfstep.precision import groups_of


def block():
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU())


def labels(target="onnxruntime", floats=()):
    torch.manual_seed(0)
    q = hs.prepare(nn.Sequential(*(block() for _ in range(5))), torch.randn(2, 8, 6, 6), target=target)
    hs.observe(q, [torch.randn(4, 8, 6, 6)])
    hs.calibrate(q)
    q.float_layers = floats
    groups = groups_of(q)
    return dict(zip([group.name for group in groups], labels_of(q, groups), strict=True))


def test_blocks_that_repeat_are_alike_but_for_the_ends():
    found = labels()
    assert found["1.0"] == found["2.0"] == found["3.0"]
    assert found["1.2"] == found["2.2"] == found["3.2"]
    assert len({found["0.0"], found["1.0"], found["1.2"], found["4.2"]}) == 4


def test_layers_in_float_change_the_labels_near_them_alone():
    before, after = labels(), labels(floats=["2.0"])
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"1.2", "2.2"}
    assert "2.0" not in after


def test_another_size_is_another_label():
    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(8, n) for n in (8, 8, 4))

        def forward(self, x):
            layers = self.a, self.b, self.c
            return [f(y.sin().cos().sin()).cos() for f, y in zip(layers, x.unbind(1), strict=True)]

    q = hs.prepare(Three().eval(), torch.randn(2, 3, 8))
    hs.observe(q, [torch.randn(4, 3, 8)])
    hs.calibrate(q)
    groups = groups_of(q)
    a, b, c = labels_of(q, groups)
    assert a == b != c
