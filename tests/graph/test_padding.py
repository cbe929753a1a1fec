"""What only fills a batch up, and constants that stand for nothing, enter no range."""

import copy
import math

import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep.errors import ArgumentError, DataError

PAD, LOUD = 0, 100.0
TOKENS = {"ids": {1: "tokens"}, "mask": {1: "tokens"}}


class Reader(nn.Module):
    """Attention written out, over words of which the one that pads is loud; masks are sums with a constant."""

    def __init__(self, width=8, heads=2):
        super().__init__()
        self.words, self.qkv = nn.Embedding(20, width), nn.Linear(width, 3 * width)
        self.heads, self.inner, self.head = heads, nn.Linear(width, width), nn.Linear(width, 3)
        with torch.no_grad():
            self.words.weight[PAD] = LOUD

    def forward(self, ids, mask):
        x = self.words(ids)
        batch, tokens, width = x.shape
        q, k, v = (y.reshape(batch, tokens, self.heads, -1).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) / math.sqrt(width // self.heads)
        scores = scores + (1 - mask[:, None, None].float()) * torch.finfo(torch.float32).min
        x = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch * tokens, width)
        x = torch.relu(self.inner(x)).reshape(batch, tokens, width)
        kept = mask[..., None].float()
        return self.head((x * kept).sum(1) / kept.sum(1))


def batch(tokens, seed, size=6):
    random = torch.Generator().manual_seed(seed)
    mask = (torch.arange(tokens) < torch.randint(2, tokens + 1, (size, 1), generator=random)).long()
    return {"ids": torch.randint(1, 20, (size, tokens), generator=random) * mask, "mask": mask}


BATCHES = [batch(tokens, tokens) for tokens in (5, 9, 6)]


@pytest.fixture(scope="module")
def reader():
    torch.manual_seed(0)
    return Reader().eval()


def observed(model, padding, target="onnxruntime"):
    q = hs.prepare(model, BATCHES[0], target=target, dynamic=TOKENS, padding=padding)
    hs.observe(q, BATCHES)
    hs.calibrate(q)
    return q


def by_hand(*, ids, mask):
    return mask.bool()


@pytest.mark.parametrize("padding", ["mask", by_hand])
def test_padding_enters_no_range(reader, padding):
    loud, quiet = observed(reader, None), observed(reader, padding)
    assert loud.sites["words"].observed_range(hs.Max())[1] == LOUD
    words = torch.cat([reader.words(x["ids"])[x["mask"].bool()] for x in BATCHES]).detach()
    assert quiet.sites["words"].histogram.count == words.numel()
    low, high = quiet.sites["words"].observed_range(hs.Max())
    assert (low, high) == (words.min(), words.max())
    # Both together in one dimension, and twice in attention's weights, of which rows and columns are left out.
    rows = sum(int(x["mask"].sum()) for x in BATCHES)
    squares = sum(int((x["mask"].sum(1) ** 2).sum()) for x in BATCHES)
    counts = {
        name: site.histogram.count for name, site in quiet.sites.items() if name in ("softmax", "reshape:3")
    }
    assert set(counts.values()) <= {rows * 8, squares * 2}, counts


def test_a_copy_leaves_out_the_same(reader):
    q = hs.prepare(reader, BATCHES[0], dynamic=TOKENS, padding="mask")
    twin = copy.deepcopy(q)
    hs.observe(twin, BATCHES)
    hs.observe(q, BATCHES)
    counts = {name: site.histogram.count for name, site in twin.sites.items()}
    assert counts == {name: site.histogram.count for name, site in q.sites.items()}
    assert twin.sites["words"].observed_range(hs.Max())[1] < LOUD


def error(model, quantized):
    with torch.no_grad():
        pairs = [(model(**x), quantized(**x)) for x in BATCHES]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(a.square().sum() for a, _ in pairs))


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_what_is_left_out_is_what_costs(reader, target):
    loud, quiet = (observed(reader, padding, target) for padding in (None, "mask"))
    assert error(reader, quiet) < error(reader, loud) / 10
    assert all(
        site.scale.max() < LOUD for site in loud.sites.values()
    )  # and no mask's constant is in any range


@pytest.mark.parametrize(
    ("padding", "dynamic", "message"),
    [
        ("masks", TOKENS, "got 'masks', needed one of 'ids', 'mask', or a function"),
        ("mask", None, r"the length of input 'mask' is fixed.* dynamic=\{'mask': \{1: 'length'\}\}"),
        (lambda ids, mask: mask.sum(1), TOKENS, r"answers \(6,\) for the example inputs"),
        (lambda ids, mask: None, TOKENS, "answers NoneType"),
    ],
)
def test_what_padding_cannot_be(reader, padding, dynamic, message):
    with pytest.raises(ArgumentError, match=message):
        hs.prepare(reader, BATCHES[0], dynamic=dynamic, padding=padding)


def test_a_mask_that_changes_its_shape_is_refused(reader):
    q = hs.prepare(
        reader, BATCHES[0], dynamic=TOKENS, padding=lambda ids, mask: mask if len(ids) == 6 else mask[:1]
    )
    with pytest.raises(DataError, match=r"padding: got \(1, 5\), needed a mask of shape \(4, 5\)"):
        hs.observe(q, [batch(5, 1, 4)])
