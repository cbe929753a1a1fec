"""Reconstruction: nearer than layer by layer, to the same bits again, cut short, and kept through export."""

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import halfstep as hs
from halfstep.errors import ArgumentError, DataError
from halfstep.fake_quantize import Mode
from halfstep.fidelity.compare import Reference
from halfstep.formats import Codebook
from halfstep.progress import BudgetSpent, interruptible
from halfstep.repair import walk as walk_file
from halfstep.repair.blocks import find_blocks
from halfstep.repair.examples import _picked as picked_examples
from halfstep.repair.learned import Drops
from tests.repair.networks import Net, built, conv, images, labelled, residual, trained
from tests.repair.test_blocks import pre_norm

FEW = hs.Reconstruction(steps=128, batch=16)
WHOLE = replace(FEW, whole=True)


def observed(make, bits, count=128):
    x, _ = labelled(count)
    q = hs.prepare(trained(make), x[:2], hs.Recipe.uniform(bits, 4, ends=8))
    hs.observe(q, x.split(32))
    hs.calibrate(q, hs.MSE(), hs.MSE())
    return q


@cache
def _once(make, bits):
    return observed(make, bits)


def ready(make=residual, bits=2):
    return copy.deepcopy(_once(make, bits))


@torch.no_grad()
def held_out(q):
    """The error of the outputs on other examples, over their variance."""
    x, _ = labelled(256, seed=7)
    with q.using(Mode.FLOAT):
        wanted = q(x)
    return float((q(x) - wanted).square().mean() / wanted.var(0).mean())


def divergence(q):
    """That of the classes' probabilities on other examples."""
    x, _ = labelled(256, seed=7)
    return Reference(q, batches=[x]).compare(q).kl


@pytest.mark.parametrize(
    ("make", "bits", "part"), [(residual, 2, 0.4), (residual, 4, 0.9), (pre_norm, 3, 0.5)]
)
def test_the_outputs_come_nearer_on_other_examples(make, bits, part):
    q = ready(make, bits)
    before = held_out(q)
    record = hs.reconstruct(q, options=hs.Reconstruction(steps=96, batch=16))
    assert held_out(q) < part * before
    assert all(done.after <= done.before for done in record.treated)


@pytest.mark.slow
def test_behind_learned_rounding_it_brings_them_nearer_still():
    learned = reconstructed = 0.0
    for seed in range(4):
        q = ready()
        hs.learn_rounding(q)
        learned += divergence(q)
        hs.reconstruct(q, options=hs.Reconstruction(steps=256, batch=16, seed=seed))
        reconstructed += divergence(q)
    assert reconstructed < learned


def test_the_float_network_stays_and_weights_are_numbers_of_the_format():
    q, x = ready(), images(8, seed=3)
    with torch.no_grad(), q.using(Mode.FLOAT):
        wanted = q(x)
    hs.reconstruct(q, options=FEW)
    with torch.no_grad(), q.using(Mode.FLOAT):
        assert torch.equal(q(x), wanted)
    for name in ("b.weight", "c.weight"):
        site, weight = q.sites[name], q.weight(name).detach()
        rounded = site.rounded(weight)
        codes = rounded / site.granularity.expand(site.scale, weight.shape)
        assert site.offset is not None and site.growth is None
        torch.testing.assert_close(codes, codes.round().clamp(-1, 1))
    assert not any(parameter.requires_grad for parameter in q.quantizers.parameters())


def test_the_same_seed_gives_the_same_bits_and_another_one_others():
    first, again, other = ready(), ready(), ready()
    for q, seed in ((first, 0), (again, 0), (other, 1)):
        torch.rand(seed + 3)  # whatever else draws numbers
        hs.reconstruct(q, options=hs.Reconstruction(steps=16, batch=16, seed=seed))
    states = [q.state_dict() for q in (first, again, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_without_learned_ranges_all_scales_stay():
    q = ready()
    before = {name: site.scale.clone() for name, site in q.sites.items()}
    record = hs.reconstruct(q, options=hs.Reconstruction(steps=32, batch=16, ranges=False))
    assert record.treated
    assert all(torch.equal(q.sites[name].scale, scale) for name, scale in before.items())
    learned = ready()
    hs.reconstruct(learned, options=hs.Reconstruction(steps=32, batch=16))
    assert not torch.equal(learned.sites["b.weight"].scale, before["b.weight"])


@pytest.mark.parametrize("options", [{"drop": 0.0}, {"fisher": True}])
def test_parts_can_be_left_out_or_put_in(options):
    q, whole = ready(), ready()
    hs.reconstruct(q, options=hs.Reconstruction(steps=32, batch=16, **options))
    hs.reconstruct(whole, options=hs.Reconstruction(steps=32, batch=16))
    assert not torch.equal(q(images(4)), whole(images(4)))
    assert held_out(q) < held_out(ready())


def test_only_the_blocks_that_are_given_and_what_is_outside_of_them():
    q = ready(pre_norm, 3)
    record = hs.reconstruct(q, blocks=["blocks"], options=hs.Reconstruction(steps=8))
    assert {"embed", "blocks", "fc"} >= {done.name for done in record.treated} >= {"blocks"}
    with pytest.raises(ArgumentError, match=r"blocks: 'block' matches no module"):
        hs.reconstruct(q, blocks=["block"])


def test_behind_the_blocks_all_are_learned_together_for_the_outputs():
    q, blocks = ready(), ready()
    record = hs.reconstruct(q, options=replace(WHOLE, steps=64))  # so few leave something to be learned
    hs.reconstruct(blocks, options=replace(FEW, steps=64))
    last = record.treated[-1]
    assert last.name == "the whole network" and last.after < last.before
    sample = list(q.sample)
    assert Reference(blocks, batches=sample).compare(blocks).kl == pytest.approx(last.before, rel=1e-4)
    assert Reference(q, batches=sample).compare(q).kl == pytest.approx(last.after, rel=1e-4)
    assert divergence(q) < divergence(blocks)
    for name in ("b.weight", "c.weight"):  # each code is what it was, its scale another
        site, weight = q.sites[name], q.weight(name).detach()
        assert torch.equal(site.codes(weight), blocks.sites[name].codes(weight))
        assert not torch.equal(site.scale, blocks.sites[name].scale)


def test_outputs_that_are_no_logits_are_learned_by_their_squared_errors():
    def two():
        return Net(
            lambda m, x: (y := m.b(F.relu(m.a(x))), m.c(y.mean((2, 3)))),
            a=conv(3, 8),
            b=conv(8, 8),
            c=nn.Linear(8, 5),
        )

    q = hs.prepare(built(two), images(2), hs.Recipe.uniform(2, 8, ends=None))
    hs.observe(q, images(64).split(16))
    hs.calibrate(q, hs.MSE(), hs.MSE())
    last = hs.reconstruct(q, options=WHOLE).treated[-1]
    assert last.name == "the whole network" and last.after < last.before

    def error(wanted, got):
        return float((got - wanted).square().mean() / wanted.square().mean())

    x = torch.cat(q.sample)
    with torch.no_grad(), q.using(Mode.FLOAT):
        wanted = q(x)
    with torch.no_grad():
        assert sum(map(error, wanted, q(x))) / 2 == pytest.approx(
            last.after, rel=0.01
        )  # but for what is quantized last


def test_shared_weights_are_left_alone_and_said():
    def twice():
        return Net(
            lambda m, x: m.c(m.b(m.b(m.a(x.flatten(1))))),
            a=nn.Linear(192, 8),
            b=nn.Linear(8, 8),
            c=nn.Linear(8, 5),
        )

    q = observed(twice, 3, 32)
    record = hs.reconstruct(q, options=hs.Reconstruction(steps=8))
    assert ("b", "its weight is shared with another layer") in record.skipped
    assert q.sites["b.weight"].offset is None


def test_codebooks_are_reconstructed_too():
    book = Codebook(torch.tensor([-1.5, -0.45, 0.45, 1.5]))
    q = observed(residual, book)
    before = held_out(q)
    assert hs.reconstruct(q, options=FEW).treated
    assert held_out(q) < before
    site, weight = q.sites["b.weight"], q.weight("b.weight").detach()
    numbers = site.rounded(weight) / site.granularity.expand(site.scale, weight.shape)
    away = (numbers[..., None] - book.values).abs().amin(-1)
    assert float(away.max()) < 1e-5


def test_batches_of_several_lengths():
    def lengths():
        return Net(lambda m, x: m.b(m.a(x).relu()).mean(1), a=nn.Linear(6, 12), b=nn.Linear(12, 3))

    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(8, length, 6, generator=generator) for length in (5, 9, 7)]
    q = hs.prepare(
        built(lengths), batches[0], hs.Recipe.uniform(2, 8, ends=None), dynamic={"x": {1: "length"}}
    )
    hs.observe(q, batches)
    hs.calibrate(q, hs.MSE(), hs.MSE())
    record = hs.reconstruct(q, options=FEW)
    assert [done.name for done in record.treated] == ["a", "b"]
    assert all(done.after <= done.before for done in record.treated)
    assert any(done.after < done.before for done in record.treated)


def test_time_that_is_up_leaves_the_blocks_behind_as_they_were():
    q = ready()
    done = 0

    def ask():
        nonlocal done
        done += 1
        if done > 250:  # a is passed by, b and c have 128 steps, the other loops a few
            raise BudgetSpent("250 steps")

    with interruptible(ask):
        record = hs.reconstruct(q, options=FEW)
    assert record.cut_short
    assert record.notes[-1].endswith(f"{record.treated[-1].name}: the blocks behind it are as they were")
    untouched = ready()
    assert q.sites["fc.weight"].offset is None
    assert torch.equal(q.sites["fc.weight"].scale, untouched.sites["fc.weight"].scale)
    assert q.sites["fc.weight"].gradient == untouched.sites["fc.weight"].gradient
    with interruptible(ask), pytest.raises(BudgetSpent):
        hs.reconstruct(ready(), options=FEW)


def test_time_that_is_up_behind_the_blocks_leaves_what_they_learned():
    q, blocks = ready(), ready()
    hs.reconstruct(blocks, options=FEW)

    asked, last = 0, None

    def ask():
        nonlocal asked
        asked += 1
        if last is not None and asked > last:
            raise BudgetSpent("the blocks")

    with interruptible(ask):
        hs.reconstruct(ready(), options=WHOLE)
        asked, last = 0, asked - FEW.steps // 4  # the blocks together take a half
        record = hs.reconstruct(q, options=WHOLE)
    assert record.cut_short
    assert record.notes[-1].endswith(f"{record.treated[-1].name}: the blocks were not learned together")
    states = [each.state_dict() for each in (q, blocks)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_memory_bounds_the_examples(monkeypatch):
    q = ready()
    blocks = find_blocks(q)
    # The most between blocks: a's outputs, 8 channels of 8x8 floats, once read by b and once by the addition.
    monkeypatch.setattr(walk_file, "MEMORY", 10 * 4 * 4 * (8 * 8 * 8 + 3 * 8 * 8))
    fitting = walk_file.examples_that_fit(q, blocks)
    assert 5 <= fitting <= 20
    few = hs.reconstruct(q, options=hs.Reconstruction(steps=8))
    monkeypatch.undo()
    same, whole = ready(), ready()
    batch, *_ = same.sample
    first = hs.reconstruct(same, [batch[:fitting]], options=hs.Reconstruction(steps=8))
    assert [done.before for done in few.treated] == [done.before for done in first.treated]
    assert (
        few.treated[0].before != hs.reconstruct(whole, options=hs.Reconstruction(steps=8)).treated[0].before
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_examples_and_masks_keep_the_order_of_memory(layout):
    x = images(6).contiguous(memory_format=layout)
    index = torch.tensor([4, 0, 0, 5])
    for axis in (0, 2):
        picked = picked_examples(x, axis, index)
        assert torch.equal(picked, x.index_select(axis, index))
        assert sorted(range(4), key=picked.stride) == sorted(range(4), key=x.stride)
    mask = Drops(0.25, 0, x.device).mask(x)
    assert mask.stride() == x.stride() and set(mask.unique().tolist()) == {0.0, 1.0}
    assert abs(float(mask.mean()) - 0.75) < 3 * (0.25 * 0.75 / x.numel()) ** 0.5


def test_bad_input():
    for name, value in (("steps", 0), ("batch", 0)):
        with pytest.raises(ArgumentError, match=rf"Reconstruction: {name} is 0, needed at least 1"):
            hs.Reconstruction(**{name: value})
    with pytest.raises(ArgumentError, match=r"Reconstruction: drop is 1.0, needed a probability from 0"):
        hs.Reconstruction(drop=1.0)
    with pytest.raises(DataError, match=r"keeps no calibration sample"):
        hs.reconstruct(ready(), [])


def test_the_file_answers_as_the_reconstructed_network(tmp_path):
    x = images(64)
    q = hs.prepare(built(residual), x[:2], hs.Recipe.uniform(2, 8))
    hs.observe(q, x.split(16))
    hs.calibrate(q, hs.MSE(), hs.MSE())
    assert hs.reconstruct(q, options=FEW).treated
    hs.export_onnx(q, tmp_path / "model.onnx")
    proof = hs.verify(tmp_path / "model.onnx", q, [images(32, seed=5)])
    assert proof.parity.top1 == 1.0
    assert proof.parity.sqnr is None or proof.parity.sqnr > 40
