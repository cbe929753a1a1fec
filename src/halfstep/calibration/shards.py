"""Statistics on disk and across processes: parts that add up to what one pass over everything would have seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from halfstep.distributed import share
from halfstep.errors import ArgumentError, DataError, named
from halfstep.fake_quantize import FakeQuantize
from halfstep.files import write_whole
from halfstep.model import QuantizedModel
from halfstep.ranges import activation_sites
from halfstep.statistics import ChannelRange, Histogram, Sparse

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
    kept = [model.sample, model.reserve]
    distributed.broadcast_object_list(kept, src=0)
    model.sample, model.reserve = kept
    for module in activation_sites(model).values():
        module.forget()
    for state in states:
        _add(model, state)


def gather_shares(model: QuantizedModel) -> None:
    """Let the sites hold on rank 0 what all ranks of a run have seen, each its share of the batches.

    What is merged are counts and the ends of the stream: the result is that of one process, bit for bit. Elsewhere the
    sites are left with nothing, so that nothing is counted twice.
    """
    mine = share()
    if mine.size == 1:
        return
    sites = activation_sites(model)
    own = [_Part.of(module) for module in sites.values()]
    merged = mine.reduced(own, _merged, "histograms")
    for module, part in zip(sites.values(), merged, strict=True):
        (part if mine.leads else part.emptied()).put(module)


@dataclass(frozen=True)
class _Part:
    """What a site has seen, as it is sent: the parts of its histogram, and the ranges of its channels."""

    histograms: tuple[Sparse, ...]
    channels: dict[str, Tensor] | None
    axis: int = 0

    @classmethod
    def of(cls, module: FakeQuantize) -> _Part:
        seen = tuple(map(Sparse.of, module.histogram.parts))
        if module.channels is None:
            return cls(seen, None)
        return cls(seen, module.channels.state_dict(), module.channels.axis)

    def merged(self, other: _Part) -> _Part:
        seen = tuple(one.merged(two) for one, two in zip(self.histograms, other.histograms, strict=True))
        if self.channels is None or other.channels is None:
            return _Part(seen, None)
        channels = _loaded(ChannelRange(self.axis), self.channels)
        channels.merge(_loaded(ChannelRange(self.axis), other.channels))
        return _Part(seen, channels.state_dict(), self.axis)

    def emptied(self) -> _Part:
        """The same parts, which have seen nothing."""
        nothing = (Sparse.of(Histogram()),) * len(self.histograms)
        return _Part(
            nothing, None if self.channels is None else ChannelRange(self.axis).state_dict(), self.axis
        )

    def put(self, module: FakeQuantize) -> None:
        for histogram, seen in zip(module.histogram.parts, self.histograms, strict=True):
            seen.put(histogram)
        if module.channels is not None and self.channels is not None:
            module.channels.load_state_dict(self.channels)


def _merged(one: list[_Part], two: list[_Part]) -> list[_Part]:
    return [part.merged(other) for part, other in zip(one, two, strict=True)]


def _loaded(seen: ChannelRange, state: dict[str, Tensor]) -> ChannelRange:
    seen.load_state_dict(state)
    return seen


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
