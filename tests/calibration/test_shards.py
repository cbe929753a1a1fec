"""Parts of the data, observed apart, add up to one pass, bit for bit."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import halfstep as hs
from halfstep.calibration.shards import _state
from halfstep.errors import ArgumentError, DataError

BATCHES = list(torch.randn(6, 16, 4, generator=torch.Generator().manual_seed(0)))


def observed(batches, recipe=None, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    q = hs.prepare(model, BATCHES[0][:2], recipe=recipe)
    if batches:
        hs.observe(q, batches, **options)
    return q


def same(a, b):
    a, b = _state(a), _state(b)
    return set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize(
    "recipe", [None, hs.Recipe(hs.LayerSpec(activations=hs.TensorSpec(8, hs.PerChannel(1))))]
)
def test_saved_parts_merge_to_one_pass(tmp_path, order, recipe):
    parts = [observed(BATCHES[:2], recipe), observed(BATCHES[2:], recipe)]
    files = [hs.save_statistics(part, tmp_path / f"{i}.safetensors") for i, part in enumerate(parts)]
    merged = observed([], recipe)
    hs.load_statistics(merged, *(files[i] for i in order))
    whole = observed(BATCHES, recipe)
    assert same(merged, whole)
    hs.calibrate(merged, hs.MSE())
    hs.calibrate(whole, hs.MSE())
    assert all(torch.equal(merged.sites[name].scale, site.scale) for name, site in whole.sites.items())


def test_loading_adds_to_what_was_observed(tmp_path):
    file = hs.save_statistics(observed(BATCHES[:2]), tmp_path / "part.safetensors")
    rest = observed(BATCHES[2:])
    hs.load_statistics(rest, file)
    assert same(rest, observed(BATCHES))


def test_ranges_of_batches_are_kept_in_the_order_of_the_files(tmp_path):
    calibrator = hs.MovingAverage(0.5)
    files = [
        hs.save_statistics(observed(part, batch_ranges=True), tmp_path / f"{i}.safetensors")
        for i, part in enumerate((BATCHES[:2], BATCHES[2:]))
    ]
    merged, whole = observed([]), observed(BATCHES, batch_ranges=True)
    hs.load_statistics(merged, *files)
    hs.calibrate(merged, calibrator)
    hs.calibrate(whole, calibrator)
    assert all(torch.equal(merged.sites[name].scale, site.scale) for name, site in whole.sites.items())


def test_files_that_do_not_fit(tmp_path):
    q = observed(BATCHES)
    with pytest.raises(DataError, match=r"statistics '.*nothing.safetensors': cannot be read: "):
        hs.load_statistics(q, tmp_path / "nothing.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(DataError, match=r"broken.safetensors': cannot be read: "):
        hs.load_statistics(q, tmp_path / "broken.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match=r"other.safetensors': is no file of statistics"):
        hs.load_statistics(q, tmp_path / "other.safetensors")
    file = hs.save_statistics(q, tmp_path / "good.safetensors")
    other = hs.prepare(nn.Linear(4, 3), BATCHES[0][:2])
    with pytest.raises(
        DataError, match=r"got sites \['1'\] that the model has not, and none for its sites \[\]"
    ):
        hs.load_statistics(other, file)


def test_gathering_needs_processes():
    with pytest.raises(
        ArgumentError, match=r"torch.distributed is not initialised; .* or use save_statistics"
    ):
        hs.gather_statistics(observed(BATCHES))


def gather(rank, directory):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=2
    )
    q = observed(BATCHES[:2] if rank == 0 else BATCHES[2:])
    hs.gather_statistics(q)
    assert torch.equal(torch.cat(q.sample), torch.cat(BATCHES[:2]))
    hs.save_statistics(q, f"{directory}/{rank}.safetensors")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_statistics_of_one_pass(tmp_path):
    torch.multiprocessing.spawn(gather, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        q = observed([])
        hs.load_statistics(q, tmp_path / f"{rank}.safetensors")
        assert same(q, observed(BATCHES))
