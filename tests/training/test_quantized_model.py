"""A QuantizedModel is an ordinary module for a loop of one's own."""

import copy

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

import halfstep as hs
from halfstep.errors import ArgumentError, RunError
from halfstep.fake_quantize import Mode
from tests.training.networks import Net, calibrated, task, trained_net


@pytest.fixture(scope="module")
def net():
    return trained_net()


def outputs(model, batches=None):
    with torch.no_grad():
        return torch.cat([model(images) for images, _ in batches or task(64)])


def test_parameters_have_the_users_names(net):
    q = calibrated(net)
    assert [name for name, _ in q.named_parameters()] == [
        "conv1.weight",
        "conv1.bias",  # batch norm's, folded
        "conv2.weight",
        "conv2.bias",
        "fc.weight",
        "fc.bias",
    ]


@pytest.mark.parametrize("autocast", [False, True])
def test_it_trains_in_a_plain_loop(net, autocast):
    q = calibrated(net, weights=3, activations=4)
    optimizer = torch.optim.SGD(q.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 16)
    losses = []
    for _ in range(2):
        for images, labels in task():
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = nn.functional.cross_entropy(q(images), labels)
            optimizer.zero_grad()
            loss.backward()
            assert all(torch.isfinite(p.grad).all() for p in q.parameters())
            nn.utils.clip_grad_norm_(q.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


def test_train_and_eval_answer_alike(net):
    q = calibrated(net)
    assert torch.equal(outputs(q.train()), outputs(q.eval()))


def test_a_state_dict_carries_ranges_through_safetensors(net):
    q = calibrated(net, weights=4)
    with torch.no_grad():
        q.weight("fc.weight").mul_(1.1)
    fresh = hs.prepare(Net(), torch.zeros(2, 1, 8, 8), hs.Recipe.uniform(4, 8, ends=None))
    assert fresh.load_state_dict(load(save(q.state_dict()))).missing_keys == []
    assert fresh.mode is Mode.QUANTIZE
    assert torch.equal(outputs(fresh), outputs(q))
    assert all(torch.equal(site.scale, fresh.sites[name].scale) for name, site in q.sites.items())


def test_an_uncalibrated_state_stays_uncalibrated(net):
    q = hs.prepare(net, torch.zeros(2, 1, 8, 8))
    fresh = calibrated(net)
    fresh.load_state_dict(q.state_dict())
    assert not any(site.calibrated for site in fresh.sites.values())


def test_a_state_of_other_float_layers_is_refused(net):
    q = calibrated(net)
    q.float_layers = ["conv2"]
    fresh = hs.prepare(Net(), torch.zeros(2, 1, 8, 8))
    with pytest.raises(
        RunError, match=r"saved with float layers \['conv2'\], this model has \[\]; set float_layers"
    ):
        fresh.load_state_dict(q.state_dict())
    fresh.float_layers = ["conv2"]
    fresh.load_state_dict(q.state_dict())
    assert torch.equal(outputs(fresh), outputs(q))


def test_sites_out_of_use_are_kept_but_are_no_part_of_the_state(net):
    q = calibrated(net)
    before = q.state_dict()
    q.float_layers = ["fc"]
    assert "quantizers.fc/weight.scale" not in q.state_dict()
    q.float_layers = []
    after = q.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert before.keys() == after.keys()


def test_a_learned_range_travels_too(net):
    q = calibrated(net)
    q.sites["fc.weight"].learn()
    with torch.no_grad():
        q.sites["fc.weight"].growth.add_(0.5)
    fresh = hs.prepare(Net(), torch.zeros(2, 1, 8, 8))
    fresh.load_state_dict(q.state_dict())
    assert torch.equal(fresh.sites["fc.weight"].scale, q.sites["fc.weight"].scale)
    assert torch.equal(outputs(fresh), outputs(q))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.a, self.b = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.a(self.conv(x)) + self.b(self.conv(x.flip(-1)))


def randomized(model):
    torch.manual_seed(1)
    for norm in model.modules():
        if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            if norm.affine:
                norm.weight.data.uniform_(0.5, 2)
                norm.bias.data.normal_()
    return model.eval()


NETWORKS = {
    "conv without bias": nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)),
    "conv with bias": nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
    "no affine": nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)),
    "transposed": nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)),
    "norm that stays": nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_trained_weights_go_back_to_the_users_module(network):
    model = randomized(NETWORKS[network])
    x = torch.randn(4, model[0].in_channels, 6, 6)
    q = hs.prepare(model, x)
    with torch.no_grad():
        for parameter in q.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    user = copy.deepcopy(model)
    user.load_state_dict(q.to_float_state_dict())
    with torch.no_grad():
        torch.testing.assert_close(user(x), q(x), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(user(x), model(x), atol=1e-2)


def test_untrained_weights_go_back_as_they_were(net):
    state = calibrated(net).to_float_state_dict()
    wanted = net.state_dict()
    assert state.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_weight_of_two_names_goes_back_under_both():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    q = hs.prepare(model, torch.randn(3, 4))
    with torch.no_grad():
        next(x for name, x in q.named_parameters() if name.endswith(".weight")).add_(0.5)
    state = q.to_float_state_dict()
    assert torch.equal(state["0.weight"], state["2.weight"])
    torch.testing.assert_close(state["0.weight"], model[0].weight + 0.5)


def test_weights_that_the_users_module_cannot_express_are_refused():
    x = torch.randn(4, 3, 5, 5)
    q = hs.prepare(randomized(Shared()), x)
    q.to_float_state_dict()
    with torch.no_grad():
        q.weight("conv.weight").mul_(1.1)
    with pytest.raises(ArgumentError, match=r"'conv.weight' is shared .* were trained apart"):
        q.to_float_state_dict()
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    model[1].weight.data[2] = 0.0
    q = hs.prepare(model, x)
    q.to_float_state_dict()
    with torch.no_grad():
        q.weight("0.weight").add_(0.1)
    with pytest.raises(ArgumentError, match=r"'0.weight': batch norm multiplies channels \[2\] by 0"):
        q.to_float_state_dict()
    q.captured.module.register_parameter("new", nn.Parameter(torch.ones(1)))
    with pytest.raises(ArgumentError, match=r"'new' is not in the user's module: the graph was rewritten"):
        q.to_float_state_dict()
