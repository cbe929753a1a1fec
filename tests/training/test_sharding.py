"""A sharded model trains as a whole one: weights are spread over ranks, quantizers are the same on all of them."""

import pytest
import torch
from torch.nn.functional import cross_entropy

import halfstep as hs
from halfstep.errors import ArgumentError, FormatError, TrainingError
from halfstep.fake_quantize import FakeQuantize
from halfstep.functional import PACT
from halfstep.training.averaging import balanced
from tests.test_distributed import BATCHES, INPUTS, network, on_ranks, own_process

LABELS = torch.arange(48) % 4
STEPS = 4


def made():
    q = hs.prepare(network(), INPUTS[:4], hs.Recipe.uniform(4, 4))
    hs.observe(q, BATCHES[:2])
    hs.calibrate(q)
    return q


def trained(q, inputs, labels, learn):
    """A few steps; where ranges are learned, those of the weights from the second step on."""
    if learn:
        for place in q.placement.sites:
            if not place.is_weight:
                q.sites[place.name].learn()
    weights = torch.optim.SGD(q.parameters(), 0.05)
    for step in range(STEPS):
        if learn and step == 1:
            for place in q.placement.sites:
                if place.is_weight:
                    weights.add_param_group({"params": q.sites[place.name].learn()})
        weights.zero_grad()
        cross_entropy(q(inputs), labels).backward()
        weights.step()


def whole(rank):
    found = {}
    for learn in (False, True):
        q = made()
        trained(q, INPUTS[:48], LABELS, learn)
        found[learn] = q.state_dict()
    return found


def in_parts(rank):
    """The same, each of two ranks with its half of the batch; and what is said of what cannot be."""
    found, mine = {}, slice(24 * rank, 24 * rank + 24)
    for learn in (False, True):
        q = hs.shard(made(), reshard_after_forward=True)
        assert all(hasattr(q.get_parameter(name), "full_tensor") for name in ("0.weight", "6.bias"))
        assert sum(p.to_local().numel() for n, p in q.named_parameters() if "quantizers" not in n) < sum(
            p.numel() for p in network().parameters()
        )
        trained(q, INPUTS[mine], LABELS[mine], learn)
        found[learn] = hs.whole_state_dict(q)
        with torch.no_grad():
            found["answer", learn] = q(INPUTS[:4])
    q = made()
    trained(torch.nn.parallel.DistributedDataParallel(q), INPUTS[mine], LABELS[mine], False)
    found["replicated"] = q.state_dict()
    words, q = [], hs.shard(made())
    for attempt in (
        lambda: hs.shard(q),
        lambda: hs.train(q, hs.Training([(INPUTS[:4], LABELS[:4])], cross_entropy)),
        lambda: part_by_itself()(INPUTS[:4]),
    ):
        try:
            attempt()
        except hs.HalfstepError as error:
            words.append((type(error), str(error)))
    return found, words


def part_by_itself():
    from torch.distributed.fsdp import fully_shard

    q = made()
    fully_shard(q.get_submodule("3"), mesh=torch.distributed.init_device_mesh("cpu", (2,)))
    return q


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return own_process(whole), on_ranks(tmp_path_factory.mktemp("sharded"), 2, in_parts)


def test_steps_are_those_of_one_process(both):
    wanted, ranks = both
    for learn in (False, True):
        before = made().state_dict()
        moved = 0
        for name, tensor in wanted[learn].items():
            for found, _ in ranks:
                assert found[learn].keys() == wanted[learn].keys()
                torch.testing.assert_close(found[learn][name], tensor, rtol=1e-3, atol=1e-5)
                assert torch.equal(found[learn][name], ranks[0][0][learn][name])
            moved += name.endswith(("scale", "growth")) and not torch.equal(tensor, before.get(name, tensor))
        assert learn == any(
            name.endswith("growth") and bool(tensor.any()) for name, tensor in wanted[learn].items()
        )
        assert learn or not moved


def test_data_parallel_takes_the_model_as_it_is(both):
    wanted, ranks = both
    for found, _ in ranks:
        for name, tensor in wanted[False].items():
            torch.testing.assert_close(found["replicated"][name], tensor, rtol=1e-3, atol=1e-5)


def test_what_was_trained_is_a_whole_model_again(both):
    found, _ = both[1][0]
    q = made()
    q.load_state_dict(found[True], strict=False)
    for place in q.sites.values():
        place.learn()
    q.load_state_dict(found[True])
    torch.testing.assert_close(q(INPUTS[:4]).detach(), found["answer", True])


def test_only_what_lsq_balances_counts_elements():
    site = FakeQuantize("here", hs.Codebook.nf4(), hs.PerTensor(), (4,))
    site.set_range(torch.tensor(-1.0), torch.tensor(1.0))
    growth, values = site.learn(values=True)
    assert site.values is values and [id(each) for each in balanced(site)] == [id(growth)]
    site.gradient = PACT
    assert balanced(site) == []


def test_what_cannot_be_is_said(both):
    twice, train, part = both[1][0][1]
    assert twice == (ArgumentError, "shard: the model is sharded already; shard it once, after hs.calibrate")
    assert (
        train[0] is TrainingError
        and "is sharded (hs.shard), which is for a training loop of your own" in train[1]
    )
    assert (
        part[0] is FormatError
        and "sharded as one, hs.shard(model), since its parts are not called" in part[1]
    )
    with pytest.raises(ArgumentError, match=r"shard: torch.distributed is not initialised"):
        hs.shard(made())
