"""Ranges that move in training, formats of few bits, oscillation; and that what was trained is what is deployed."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

import halfstep as hs
from halfstep.calibrators import MSE
from halfstep.errors import FormatError, NotObservedError, TrainingError
from halfstep.fake_quantize import FakeQuantize, Mode
from halfstep.fidelity.compare import compare
from halfstep.formats import Codebook, Integer
from halfstep.functional import CLIPPED_STE, LSQ, PACT, binary_scale
from halfstep.granularity import PerChannel, PerTensor
from halfstep.runtime.deployed import DeployedModel
from halfstep.training.fit import fit
from halfstep.training.oscillation import BITS, Damping, Freezing
from halfstep.training.ranges import MovingRanges, Ranges
from halfstep.training.trained import Judgement
from tests.training.networks import Killing, calibrated, task, trained_net

HELD_OUT = hs.Accuracy(task(512, 256, seed=1))
AFFINE = Integer(4, signed=False, symmetric=False)
FOUR = Codebook(torch.tensor([-1.0, -0.3, 0.3, 1.0]))


@pytest.fixture(scope="module")
def net():
    return trained_net()


@pytest.fixture(scope="module")
def prepared(net):
    return calibrated(net, 3, 4)


@pytest.fixture
def low(prepared):
    return copy.deepcopy(prepared)


def options(**changes):
    return hs.Training(**{"labelled": task(), "loss": cross_entropy, "learning_rate": 1e-2} | changes)


def site(format, low, high, granularity=None, shape=(3, 4)):
    found = FakeQuantize("fc", format, granularity or PerTensor(), shape)
    ends = (torch.full(found.scale.shape, end) for end in (low, high))
    found.set_range(*ends)
    return found


# one site


def test_a_learned_step_starts_where_the_calibrated_one_is_and_settles_exactly():
    module = site(Integer(8), -0.7, 0.7)
    scale = module.scale.clone()
    (growth,) = module.learn()
    assert torch.equal(module.scale, scale)
    growth.data.fill_(1.0)
    assert torch.equal(module.scale, 2 * scale)
    module.settle()
    assert torch.equal(module.scale, 2 * scale)
    assert list(module.parameters()) == []


def test_the_gradient_of_the_growth_is_that_of_the_step():
    """d scale / d growth = scale ln 2, so the two gradients have that ratio."""
    from halfstep.functional import LSQ, fake_quantize

    module = site(Integer(4), -1.0, 1.0, PerChannel(0))
    module.gradient, module.mode = LSQ, type(module.mode).QUANTIZE
    (growth,) = module.learn()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    module(x).square().sum().backward()
    scale = module.scale.detach().requires_grad_()
    fake_quantize(x, scale, None, Integer(4), PerChannel(0), LSQ).square().sum().backward()
    torch.testing.assert_close(growth.grad, scale.grad * scale.detach() * torch.log(torch.tensor(2.0)))


@pytest.mark.parametrize(("chosen", "then"), [(CLIPPED_STE, LSQ), (PACT, PACT)])
def test_a_learned_step_has_lsqs_gradient_where_no_other_was_chosen(chosen, then):
    module = site(Integer(8), -0.7, 0.7)
    module.gradient = chosen
    module.learn(step=False)
    assert module.gradient is chosen
    module.learn()
    assert module.gradient is then


@pytest.mark.parametrize(
    ("format", "low", "learned"),
    [
        (AFFINE, -1.0, {"growth", "zero"}),
        (AFFINE, 0.0, {"growth"}),  # after ReLU the zero point must stay the lowest code
        (Integer(4), -1.0, {"growth"}),
        (Integer(4, power_of_two=True), -1.0, set()),
        (FOUR, -1.0, {"growth", "values"}),
        (Codebook.rule([-1, 0, 1], [-0.5, 0.5]), -1.0, {"values"}),
    ],
)
def test_what_a_format_lacks_is_not_learned(format, low, learned):
    module = site(format, low, 1.0)
    module.learn(step=True, offset=True, values=True)
    assert {name for name, _ in module.named_parameters()} == learned


def test_a_learned_zero_point_is_rounded_in_use():
    module = site(AFFINE, -1.0, 1.0)
    module.learn(step=False, offset=True)
    module.zero.data.fill_(3.4)
    assert module.zero_point.item() == 3
    module.zero.data.fill_(99.0)
    assert module.zero_point.item() == 15
    module.settle()
    assert module.zero_point.item() == 15


def test_learned_values_stay_a_codebook_even_where_they_meet():
    module = site(FOUR, -1.0, 1.0)
    module.learn(values=True)
    module.values.data.copy_(torch.tensor([0.5, 0.5, -1.0, 2.0]))
    format = module.format
    assert format.values[[0, 1, 3]].tolist() == [-1.0, 0.5, 2.0]
    assert format.values[2] > format.values[1]
    torch.testing.assert_close(format.thresholds, torch.tensor([-0.25, 0.5, 1.25]))
    module.values.data[0] = float("nan")
    with pytest.raises(FormatError, match="a learned value is NaN or infinite"):
        _ = module.format


def test_calibrating_again_forgets_what_was_learned():
    module = site(Integer(8), -1.0, 1.0)
    module.learn()
    module.set_range(torch.tensor(-2.54), torch.tensor(2.54))
    assert list(module.parameters()) == []
    assert module.scale.item() == pytest.approx(0.02)


def test_an_uncalibrated_site_cannot_learn():
    with pytest.raises(NotObservedError, match="site 'fc': has no range yet"):
        FakeQuantize("fc", Integer(8), PerTensor(), (3, 4)).learn()


# a model


def test_learned_ranges_move_only_after_their_share_of_the_steps(low):
    before = {name: module.scale.clone() for name, module in low.sites.items()}
    hs.train(low, options(epochs=0.5, ranges=Ranges(after=1.0)))
    assert all(torch.equal(module.scale, before[name]) for name, module in low.sites.items())
    hs.train(low, options(epochs=0.5, ranges=Ranges(after=0.5)))
    assert not any(torch.equal(module.scale, before[name]) for name, module in low.sites.items())
    assert not any(name.startswith("quantizers.") for name, _ in low.named_parameters())


def test_what_is_settled_for_a_score_is_restored_to_the_bit(net):
    net = copy.deepcopy(net)
    with torch.no_grad():
        net.conv2.weight[2], net.conv2.bias[2] = 1e-12, 0.5
    q = calibrated(net, recipe=hs.Recipe.uniform(4, AFFINE))
    ranges = MovingRanges(q, Ranges(offsets=True))
    ranges.move(True)
    with torch.no_grad():
        for parameter in ranges.parameters:
            parameter.sub_(0.3)
    before = {name: tensor.clone() for name, tensor in q.state_dict().items()}
    site = q.sites["conv2.weight"]
    scale, parameters = site.scale.detach().clone(), list(ranges.parameters)
    with ranges.settled():
        assert float(site.scale[2]) > float(scale[2])  # room for the bias
        assert torch.equal(site.scale[3], scale[3])
        assert not any(module.growth is not None for module in q.sites.values())
    assert before.keys() == q.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in q.state_dict().items())
    now = {id(parameter) for parameter in q.parameters()}
    assert {id(parameter) for parameter in parameters} <= now
    assert all(parameter.requires_grad for parameter in parameters)


@pytest.mark.parametrize("ranges", [Ranges(after=0), Ranges("follow", after=0, offsets=True)])
def test_how_often_a_training_is_scored_does_not_change_its_course(low, ranges):
    class Shuffled:
        def __iter__(self):
            for index in torch.randperm(8).tolist():
                images, labels = task()[index]
                yield images + 0.1 * torch.randn_like(images), labels

    def trained(judge, every):
        q = copy.deepcopy(low)
        q.set_mode(Mode.QUANTIZE)
        found = fit(q, options(labelled=Shuffled(), ranges=ranges, evaluate_every=every), judge)
        return found, q.state_dict()

    def judge(step):
        return Judgement(float(torch.randn(1)), -step, False)  # draws numbers; the last one is the best

    never, state = trained(None, 1.0)
    often, other = trained(judge, 0.125)
    assert len(often.marks) == 9
    assert never.losses == often.losses
    assert all(torch.equal(tensor, other[name]) for name, tensor in state.items())


def test_ranges_that_follow_keep_their_proportion_to_the_weights(low):
    def proportion():
        found = {}
        for name, module in low.sites.items():
            if module.granularity != PerTensor():
                found[name] = module.scale / low.weight(name).detach().abs().flatten(1).mean(1)
        return found

    before = proportion()
    hs.train(low, options(ranges=Ranges(weights="follow", activations="fixed", after=0)))
    for name, now in proportion().items():
        torch.testing.assert_close(now, before[name])


def test_binary_weights_have_xnor_nets_scale_at_every_step(net):
    q = calibrated(net, recipe=hs.Recipe.uniform(Codebook.binary(), 8, ends=8))
    for name, module in q.sites.items():
        if module.format == Codebook.binary():
            module.scale.copy_(binary_scale(q.weight(name), module.granularity))
    trained = hs.train(q, options(epochs=3, ranges=Ranges(after=0)), HELD_OUT)
    assert trained.marks[-1].score > trained.marks[0].score
    scale = q.sites["conv2.weight"].scale
    torch.testing.assert_close(scale, binary_scale(q.weight("conv2.weight"), PerChannel(0)))


def test_a_codebook_learns_its_values_and_they_travel(net):
    recipe = hs.Recipe.uniform(FOUR, 8, ends=None)
    q = calibrated(net, recipe=recipe)
    fixed = copy.deepcopy(q)
    trained = hs.train(q, options(epochs=2), HELD_OUT)
    values = q.sites["conv2.weight"].format.values
    assert not torch.allclose(values, FOUR.values)
    assert torch.equal(values, values.sort().values)
    assert trained.marks[-1].score > trained.marks[0].score
    hs.train(fixed, options(epochs=1, ranges=Ranges(codebooks=False)))
    assert fixed.sites["conv2.weight"].format == FOUR
    fixed.load_state_dict(q.state_dict())
    assert fixed.sites["conv2.weight"].format == q.sites["conv2.weight"].format
    with torch.no_grad():
        x = task(8)[0][0]
        assert torch.equal(fixed(x), q(x))
        assert set(
            torch.unique(
                (
                    fixed.sites["conv2.weight"](q.weight("conv2.weight"))
                    / q.sites["conv2.weight"].scale.view(-1, 1, 1, 1)
                )
                .double()
                .mul(1e4)
                .round()
            ).tolist()
        ) <= set(values.double().mul(1e4).round().tolist())


def test_training_goes_on_from_a_learned_rounding(low):
    name = "conv2.weight"
    module, weight = low.sites[name], low.weight(name)
    with torch.no_grad():
        scale = module.granularity.expand(module.scale, weight.shape)
        module.round_to(weight, (weight / scale).floor().clamp(-3, 3) * scale)
        wanted = module.rounded(weight)
        MovingRanges(low, Ranges())
        assert module.offset is None
        torch.testing.assert_close(module.rounded(weight), wanted)


@pytest.mark.parametrize(
    "ranges", [Ranges(), Ranges(offsets=True, after=0), Ranges(weights="fixed", activations="fixed")]
)
@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (2, 4)])
def test_what_was_trained_is_what_is_deployed(net, tmp_path, bits, ranges):
    if bits != (4, 8) and ranges != Ranges():
        pytest.skip("one width is enough for the other ranges")
    q = calibrated(net, *bits)
    hs.train(q, options(ranges=ranges))
    path = hs.export_onnx(q, tmp_path / "trained.onnx")
    parity = compare(q, DeployedModel(path), [images for images, _ in task(64)])
    # As without training: float sums in another order cost a code here and there, and a code of 4 bits is large.
    assert parity.sqnr > (35 if bits[1] == 8 else 18)
    assert parity.top1 > 0.96


@pytest.mark.parametrize("weights", [FOUR, Integer(2), Codebook.binary()], ids=str)
def test_trained_codebooks_ternary_and_binary_weights_are_deployed(net, tmp_path, weights):
    q = calibrated(net, recipe=hs.Recipe.uniform(weights, 8, ends=None))
    hs.train(q, options())
    path = hs.export_onnx(q, tmp_path / "trained.onnx")
    parity = compare(q, DeployedModel(path), [images for images, _ in task(64)])
    assert parity.sqnr > 35
    assert parity.top1 > 0.96


# oscillation


def spread(model):
    """The mean distance of weights from the numbers they round to, in steps."""
    found = []
    for name, module in model.sites.items():
        if module.granularity != PerTensor():
            weight = model.weight(name).detach()
            steps = module.granularity.expand(module.scale, weight.shape)
            found.append(((weight - module.rounded(weight)) / steps).abs().clamp(max=0.5).mean())
    return float(sum(found) / len(found))


def test_damping_pulls_weights_to_their_numbers(low):
    fixed = Ranges(weights="fixed", activations="fixed")
    free, damped = copy.deepcopy(low), copy.deepcopy(low)
    hs.train(free, options(epochs=3, ranges=fixed))
    hs.train(damped, options(epochs=3, ranges=fixed, oscillation=Damping(3.0)))
    assert spread(damped) < 0.7 * spread(free)


def test_a_weight_that_jumps_to_and_fro_is_frozen_where_it_mostly_was(low):
    name = "conv2.weight"
    weight, module = low.weight(name), low.sites[name]
    scale = module.granularity.expand(module.scale, weight.shape).clone()
    with torch.no_grad():
        weight[0, 0, 0, 0] = scale[0, 0, 0, 0]
        keeper = Freezing(threshold=0.25, momentum=0.2).start(low)
        steady = weight[1].clone()
        for code in [1, 1, 0, 1, 1, 0, 1]:
            weight[0, 0, 0, 0] = code * scale[0, 0, 0, 0]
            keeper.after_step()
        for _ in range(3):  # the optimizer still pushes
            weight[0, 0, 0, 0] = 0.0
            keeper.after_step()
    assert weight[0, 0, 0, 0].item() == pytest.approx(scale[0, 0, 0, 0].item())
    assert torch.equal(weight[1], steady)


def test_freezing_goes_on_after_a_kill(low, tmp_path):
    labelled = task()

    def run(directory, loss):
        q = copy.deepcopy(low)
        training = options(
            labelled=labelled, loss=loss, epochs=2, oscillation=Freezing(0.05, 0.1), checkpoint_every=3
        )
        hs.train(q, training, directory=directory)
        return q

    whole = run(tmp_path / "whole", Killing())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", Killing(10))
    broken = run(tmp_path / "broken", Killing())
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), broken.parameters(), strict=True))


def test_only_few_bits_are_looked_after(net):
    assert BITS == 4
    keeper = Freezing().start(calibrated(net, 8, 8))
    assert keeper.state() == {}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Damping(0.0), r"Damping: strength is 0.0, needed a number above 0"),
        (lambda: Freezing(threshold=1.5), r"Freezing: threshold is 1.5, needed a number from 0 to 1"),
    ],
)
def test_options_that_cannot_be(make, message):
    with pytest.raises(TrainingError, match=message):
        make()


def test_ranges_start_from_the_best_calibration(net):
    q = calibrated(net, 2, 8)
    hs.calibrate(q, MSE(), MSE())
    start = q.sites["conv2.weight"].scale.clone()
    hs.train(q, options(epochs=0.125, ranges=Ranges(after=1.0)))
    assert torch.equal(q.sites["conv2.weight"].scale, start)
