"""Statistics on disk and across processes: parts that add up to what one pass over everything would have seen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from halfstep.errors import ArgumentError, DataError, named
from halfstep.files import write_whole
from halfstep.model import QuantizedModel
from halfstep.ranges import activation_sites

_KIND = {"halfstep": "statistics, version 1"}


def save_statistics(model: QuantizedModel, path: str | Path) -> Path:
    """Write what the activations' sites have seen to a safetensors file, from which any calibrator can be asked later.

    The examples kept for scoring are not written: :func:`best_of` needs :func:`observe` in its own process.

    Args:
        model: observed.
        path: the file appears whole or not at all.

    Raises:
        RunError: if it cannot be written.
    """
    from safetensors.torch import save

    write_whole(Path(path), save(_state(model), metadata=_KIND))
    return Path(path)


def load_statistics(model: QuantizedModel, *paths: str | Path) -> None:
    """Add what was saved to what ``model`` has seen: several parts give what one pass over all of them would.

    The same bit for bit, whatever the parts and their order. (Only the ranges of single batches, which
    :class:`MovingAverage` asks for, follow the order of the files.)

    Args:
        model: prepared as those were that saved; observed before or not.
        paths: files of :func:`save_statistics`.

    Raises:
        DataError: a file cannot be read, is of another kind, or speaks of other sites than the model has.
    """
    for path in paths:
        with named(f"statistics {str(path)!r}"):
            _add(model, _read(Path(path)))


def gather_statistics(model: QuantizedModel) -> None:
    """Add up what all processes of ``torch.distributed`` have seen, each its own part of the data.

    Every process calls this after :func:`observe` and then has the statistics of the whole, and the examples that the
    first one kept, so that all take the same decisions.

    Raises:
        ArgumentError: ``torch.distributed`` is not initialised.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        raise ArgumentError(
            "gather_statistics: torch.distributed is not initialised; call torch.distributed.init_process_group, "
            "as programs started by torchrun do, or use save_statistics and load_statistics"
        )
    states: list[dict[str, Tensor]] = [{} for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(states, _state(model))
    sample = [model.sample]
    distributed.broadcast_object_list(sample, src=0)
    model.sample = sample[0]
    for module in activation_sites(model).values():
        module.forget()
    for state in states:
        _add(model, state)


def _state(model: QuantizedModel) -> dict[str, Tensor]:
    return {
        f"{name}.{part}": tensor
        for name, module in activation_sites(model).items()
        for part, tensor in module.statistics().items()
    }


def _add(model: QuantizedModel, state: Mapping[str, Tensor]) -> None:
    sites = activation_sites(model)
    by_site: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        name, _, part = key.rpartition(".")
        by_site.setdefault(name, {})[part] = tensor
    if set(by_site) != set(sites):
        missing, unknown = sorted(set(sites) - set(by_site)), sorted(set(by_site) - set(sites))
        raise DataError(
            f"got sites {unknown} that the model has not, and none for its sites {missing}; needed statistics of the "
            "same model, recipe, target and float layers"
        )
    for name, module in sites.items():
        with named(f"site {name!r}"):
            module.add_statistics(by_site[name])


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            if (file.metadata() or {}).get("halfstep") != _KIND["halfstep"]:
                raise DataError("is no file of statistics; needed one that save_statistics wrote")
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    except (SafetensorError, OSError) as error:
        raise DataError(f"cannot be read: {error}") from error
