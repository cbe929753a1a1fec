"""Items side by side: in order, each on few threads, with the caller's settings, and nothing left running."""

import threading
import time
from typing import ClassVar

import pytest
import torch

import halfstep as hs
from halfstep.cores import one_thread, side_by_side
from halfstep.errors import DataError
from halfstep.statistics import ChannelRange, Histogram


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield 2
    torch.set_num_threads(before)


def test_results_come_in_order_whoever_is_done_first(threads):
    def work(i):
        time.sleep(0.02 * (i % 2 == 0))
        return i

    assert list(side_by_side(work, range(7))) == list(range(7))


def test_each_worker_has_its_share_of_the_threads_and_the_callers_settings(threads):
    def work(_):
        return torch.get_num_threads(), torch.is_grad_enabled(), threading.get_ident()

    with torch.no_grad():
        found = list(side_by_side(work, range(20)))
    assert {(own, grad) for own, grad, _ in found} == {(1, False)}
    assert threading.get_ident() not in {ident for _, _, ident in found}
    assert next(side_by_side(work, [0]))[1]
    assert torch.get_num_threads() == 2
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [2]


def test_one_worker_is_the_caller_and_so_is_one_within_a_worker(threads):
    def who(_):
        return threading.get_ident()

    assert list(side_by_side(who, range(2), workers=1)) == [threading.get_ident()] * 2
    nested = list(side_by_side(lambda i: (who(i), *side_by_side(who, range(3))), range(2)))
    assert all(len(set(row)) == 1 for row in nested)
    with torch.autocast("cpu"):
        assert list(side_by_side(who, range(2))) == [threading.get_ident()] * 2


def test_items_are_taken_as_they_are_needed_and_the_first_error_ends_it(threads):
    taken, running = [], []

    def items():
        for i in range(10):
            taken.append(i)
            yield i

    def work(i):
        running.append(i)
        time.sleep(0.01)
        running.remove(i)
        if i in (1, 2):
            raise ValueError(i)
        return i

    results = side_by_side(work, items())
    assert next(results) == 0 and taken == [0, 1]
    with pytest.raises(ValueError, match="1"):
        list(results)
    assert taken == [0, 1, 2] and running == []


def test_statistics_counted_at_once_are_those_counted_in_turn(threads):
    parts = [*torch.randn(40, 8, 2000, generator=torch.Generator().manual_seed(0)).unbind()]
    parts[7][0, :3] = torch.nan
    alone, together = Histogram(), Histogram()
    channels = ChannelRange(0), ChannelRange(0)
    nans = [alone.update(part) for part in parts]
    for part in parts:
        channels[0].update(part)
    assert list(side_by_side(together.update, parts)) == nans == [0] * 7 + [3] + [0] * 32
    list(side_by_side(channels[1].update, parts))
    one, two = alone.state_dict(), together.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(map(torch.equal, channels[0].range(), channels[1].range()))


def test_a_generator_may_use_its_memory_again_for_the_next_batch(threads):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())
    data = torch.randn(6, 5, 4)

    def batches():
        memory = torch.empty(5, 4)
        for part in data:
            yield memory.copy_(part)

    found = [hs.observe(hs.prepare(model, data[0]), some) for some in (list(data), batches())]
    for name in found[0]:
        one, two = (each[name].state_dict() for each in found)
        assert all(torch.equal(one[part], two[part]) for part in one)


def test_the_batch_with_nan_is_the_one_that_is_named(threads):
    data = torch.randn(6, 5, 4)
    data[4, 0, 0] = torch.nan
    model = hs.prepare(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU()), data[0])
    with pytest.raises(DataError, match="calibration batch 4: site 'input': 1 of 20 values are NaN"):
        hs.observe(model, data)


def test_beside_workers_the_caller_has_one_thread_and_then_its_own_again(threads):
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


def test_batches_are_copied_on_one_thread(threads):
    class Watched(torch.Tensor):
        seen: ClassVar[list] = []

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is torch.clone:
                cls.seen.append(torch.get_num_threads())
            return super().__torch_function__(function, types, args, kwargs)

    q = hs.prepare(torch.nn.Sequential(torch.nn.Linear(4, 4)), torch.randn(2, 4))
    hs.observe(q, [torch.randn(8, 4).as_subclass(Watched)])
    assert Watched.seen and set(Watched.seen) == {1} and torch.get_num_threads() == 2
