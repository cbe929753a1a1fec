"""Which layers are repaired together: skips, the modules around them, or what the user says."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import halfstep as hs
from bench.networks.mobilenet import InvertedResidual
from bench.networks.vit import Block as TransformerBlock
from halfstep.errors import ArgumentError
from halfstep.repair.blocks import Block, find_blocks, in_order
from tests.repair.networks import Net, built, chain, conv, images, residual, tokens


def prepared(make, x=None, **options):
    return hs.prepare(built(make), images(2) if x is None else x, **options)


def layers_by_block(q, given=None):
    return {block.name: [layer.name for layer in block.layers] for block in find_blocks(q, given)}


class PostNorm(nn.Module):
    """Attention of one head and an MLP as BERT has them: each adds inside of a module that reads two tensors."""

    class Output(nn.Module):
        def __init__(self, inputs, width):
            super().__init__()
            self.dense, self.norm = nn.Linear(inputs, width), nn.LayerNorm(width)

        def forward(self, y, x):
            return self.norm(self.dense(y) + x)

    def __init__(self, width=8):
        super().__init__()
        self.query, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.attended = self.Output(width, width)
        self.wide = nn.Linear(width, 2 * width)
        self.output = self.Output(2 * width, width)

    def forward(self, x):
        scores = (self.query(x) @ x.transpose(1, 2)).softmax(-1)
        x = self.attended(scores @ self.value(x), x)
        return self.output(F.gelu(self.wide(x)), x)


def patches(x):
    return x.flatten(2).transpose(1, 2)  # (batch, 64, 3)


def post_norm():
    return Net(
        lambda m, x: m.fc(m.blocks(m.embed(patches(x))).mean(1)),
        embed=nn.Linear(3, 8),
        blocks=nn.Sequential(PostNorm(), PostNorm()),
        fc=nn.Linear(8, 4),
    )


def pre_norm():
    return Net(
        lambda m, x: m.fc(m.blocks(m.embed(patches(x))).mean(1)),
        embed=nn.Linear(3, 8),
        blocks=nn.Sequential(TransformerBlock(8, 2), TransformerBlock(8, 2)),
        fc=nn.Linear(8, 5),
    )


def inverted():
    return Net(
        lambda m, x: m.fc(m.blocks(F.relu(m.stem(x))).mean((2, 3))),
        stem=conv(3, 8),
        blocks=nn.Sequential(
            InvertedResidual(8, 8, 1, nn.ReLU6, excite=False),
            InvertedResidual(8, 12, 2, nn.ReLU6, excite=True),
        ),
        fc=nn.Linear(12, 4),
    )


def test_a_skip_in_plain_code_is_a_block_with_the_activation_behind_it():
    q = prepared(residual)
    blocks = find_blocks(q)
    assert [block.name for block in blocks] == ["a", "b to c", "fc"]
    skip = blocks[1]
    assert [layer.name for layer in skip.layers] == ["b", "c"]
    assert len(skip.entries) == len(skip.outputs) == 1
    assert skip.outputs[0].target is torch.ops.aten.relu.default


def test_a_module_around_a_skip_is_the_block_and_so_are_others_of_its_class():
    assert layers_by_block(prepared(inverted)) == {
        "stem": ["stem"],
        "blocks.0": [f"blocks.0.body.{index}" for index in (0, 3, 6)],
        "blocks.1": [
            "blocks.1.body.0",
            "blocks.1.body.3",
            "blocks.1.body.6.reduce",
            "blocks.1.body.6.expand",
            "blocks.1.body.7",
        ],
        "fc": ["fc"],
    }


@pytest.mark.parametrize("make", [pre_norm, post_norm])
def test_a_transformer_block_is_one_block(make):
    found = layers_by_block(prepared(make))
    assert list(found) == ["embed", "blocks.0", "blocks.1", "fc"]
    assert len(found["blocks.1"]) == (4 if make is pre_norm else 5)


def test_layers_without_skips_are_blocks_by_themselves_with_their_activations():
    q = prepared(chain)
    blocks = find_blocks(q)
    assert [block.name for block in blocks] == ["a", "b", "c"]
    assert [len(block.nodes) for block in blocks] == [2, 2, 1]


def test_a_skip_over_several_blocks_is_no_block():
    def long_skip():
        return Net(
            lambda m, x: m.fc((m.blocks(y := m.embed(patches(x))) + y).mean(1)),
            embed=nn.Linear(3, 8),
            blocks=nn.Sequential(TransformerBlock(8, 2), TransformerBlock(8, 2)),
            fc=nn.Linear(8, 4),
        )

    assert list(layers_by_block(prepared(long_skip))) == ["embed", "blocks.0", "blocks.1", "fc"]


def test_float_layers_are_in_no_block():
    q = prepared(residual)
    q.float_layers = ["b", "fc"]
    assert layers_by_block(q) == {"a": ["a"], "c": ["c"]}


@pytest.mark.parametrize("make", [residual, inverted, pre_norm, post_norm, tokens])
def test_the_order_has_every_node_behind_what_it_reads(make):
    q = prepared(make)
    seen = {node for node in q.graph.nodes if node.op in ("placeholder", "get_attr")}
    for item in in_order(q.graph, find_blocks(q)):
        for node in item.nodes if isinstance(item, Block) else (item,):
            assert seen.issuperset(node.all_input_nodes)
            seen.add(node)
    assert seen == {node for node in q.graph.nodes if node.op != "output"}


def test_blocks_that_a_user_gives():
    q = prepared(inverted)
    found = layers_by_block(q, ["blocks"])
    assert list(found) == ["stem", "blocks", "fc"]
    assert len(found["blocks"]) == 8
    assert list(layers_by_block(q, ["blocks.?"])) == ["stem", "blocks.0", "blocks.1", "fc"]


def test_blocks_that_cannot_be():
    q = prepared(inverted)
    with pytest.raises(ArgumentError, match=r"blocks: 'block.0' matches no module that .* 'blocks.0'"):
        find_blocks(q, ["block.0"])
    with pytest.raises(ArgumentError, match=r"'blocks' and 'blocks.0' overlap; a layer is in one block"):
        find_blocks(q, ["blocks", "blocks.0"])
    with pytest.raises(ArgumentError, match=r"'blocks.0.body.2' has no quantized layer with a weight"):
        find_blocks(q, ["blocks.0.body.2"])

    class Ends(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = conv(3, 8), conv(8, 4)

        def forward(self, x, last=False):
            return self.last(x) if last else self.first(x)

    with pytest.raises(ArgumentError, match=r"leaves 'm' and enters it again"):
        find_blocks(
            prepared(lambda: Net(lambda m, x: m.m(m.b(F.relu(m.m(x))), True), m=Ends(), b=conv(8, 8))), ["m"]
        )
