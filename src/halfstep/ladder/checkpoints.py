"""What a run keeps of its work beside evaluations, so that it goes on to the last bit, on another processor too.

Statistics, compared calibrations, repairs, rankings and the rungs' ends come from sums whose last bits depend on the
processor. Computed anew they would be other candidates, and nothing that is known of the old ones would hold. So each
is kept with a key of what it was computed from, and taken as it was where the key is the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from halfstep.graph.inputs import ModelInputs, call_arguments
from halfstep.identity import Identity
from halfstep.journal import Journal, Saved
from halfstep.model import QuantizedModel
from halfstep.ranges import activation_sites
from halfstep.snapshot import fingerprint
from halfstep.statistics import Histogram

Tensors = dict[str, torch.Tensor]

#: Between the parts of a tensor's name; no module path has it.
_SEPARATOR = "|"


#: The model's lists of calibration inputs.
_KEPT = ("sample", "reserve")


class Checkpoints:
    """The checkpoints of a run.

    Args:
        journal: where they are kept.
        model: observed, or about to be.

    Attributes:
        observed: the statistics that all rungs start from, by site.
        key: a digest of them.
    """

    def __init__(self, journal: Journal, model: QuantizedModel) -> None:
        self.journal, self.model = journal, model
        self.observed: dict[str, Histogram] = {}
        self.key = ""

    # statistics

    def keep_statistics(self, said: Sequence[str], examples: Sequence[bytes]) -> None:
        """Keep what was observed and the sample of inputs, with what was said of them, and the examples' digests."""
        tensors, plain = _histograms(self.model, {}), dict[str, Any]()
        for kind in _KEPT:
            leaves = [self._leaves(inputs) for inputs in getattr(self.model, kind)]
            tensors |= {
                _joined(kind, batch, place): leaf
                for batch, some in enumerate(leaves)
                for place, leaf in enumerate(some)
                if isinstance(leaf, torch.Tensor)
            }
            plain[kind] = [
                [None if isinstance(leaf, torch.Tensor) else leaf for leaf in some] for some in leaves
            ]
        tensors["examples"] = torch.tensor([list(digest) for digest in examples], dtype=torch.uint8)
        self.journal.save("statistics", tensors, data={"said": list(said), **plain})
        self._begin()

    def statistics(self) -> tuple[list[str], list[bytes]] | None:
        """Give the model what :meth:`keep_statistics` kept; what was said, and the examples' digests. None without."""
        kept = self.journal.load("statistics")
        if kept is None:
            return None
        _load_histograms(self.model, kept.tensors)
        for kind in _KEPT:
            batches = [
                self._inputs(
                    [kept.tensors.get(_joined(kind, batch, place), leaf) for place, leaf in enumerate(some)]
                )
                for batch, some in enumerate(kept.data.get(kind, ()))
            ]
            setattr(self.model, kind, batches)
        self._begin()
        return list(kept.data["said"]), [bytes(row) for row in kept.tensors["examples"].tolist()]

    def _begin(self) -> None:
        self.observed = {name: site.histogram for name, site in activation_sites(self.model).items()}
        saved = [
            entry.data["sha256"]
            for entry in self.journal.of("checkpoint")
            if entry.data["name"] == "statistics"
        ]
        self.key = saved[-1] if saved else ""

    def _leaves(self, inputs: ModelInputs) -> list[Any]:
        return self.model.flatten(*call_arguments(inputs))

    def _inputs(self, leaves: Sequence[Any]) -> ModelInputs:
        args, kwargs = pytree.tree_unflatten(list(leaves), self.model.captured.in_spec)
        inputs: ModelInputs = kwargs or args
        return inputs

    def key_of(self, *about: object) -> str:
        """A digest of the network as it stands, its statistics, and what else a piece of work depends on."""
        return Identity(fingerprint(self.model), self.key, *map(repr, about)).digest

    # the network

    def keep_network(
        self, name: str, key: str, state: Tensors, data: Mapping[str, Any] | None = None
    ) -> None:
        """Keep a state dict of the model, with the statistics that are no longer those that were observed."""
        tensors = {_joined("state", part): tensor for part, tensor in state.items()}
        self.journal.save(name, tensors | _histograms(self.model, self.observed), key, data)

    def network(self, kept: Saved) -> Tensors:
        """Give the model the statistics of a checkpoint of :meth:`keep_network`; its state dict, not yet loaded."""
        _load_histograms(self.model, kept.tensors)
        return {
            part: tensor
            for kind, part, tensor in ((*_parts(name), tensor) for name, tensor in kept.tensors.items())
            if kind == "state"
        }


def _joined(*parts: object) -> str:
    return _SEPARATOR.join(map(str, parts))


def _parts(name: str) -> tuple[str, str]:
    kind, _, rest = name.partition(_SEPARATOR)
    return kind, rest


def _histograms(model: QuantizedModel, but: Mapping[str, Histogram]) -> Tensors:
    """The statistics of the activations in use, but for those that are the very ones named."""
    return {
        _joined("statistics", part, site): tensor
        for site, module in activation_sites(model).items()
        if but.get(site) is not module.histogram
        for part, tensor in module.statistics().items()
    }


def _load_histograms(model: QuantizedModel, tensors: Tensors) -> None:
    by_site: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        kind, rest = _parts(name)
        if kind == "statistics":
            part, site = _parts(rest)
            by_site.setdefault(site, {})[part] = tensor
    for site, module in activation_sites(model).items():
        if site in by_site:
            module.forget()
            module.add_statistics(by_site[site])
