"""What repairs learned to make up for errors, kept with the assignment of layers that it was fitted to.

A learned rounding or a bias shift undoes the errors of all that is quantized in its layer and before it. With other
layers in float, in 16 bits or with ranges at run time those errors are others, and the compensation is itself one. So
it is in force only where what comes before the layer is quantized as it was, which the layer's lineage tells.

What a layer computes from: the quantizers in it and before it, as a digest.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from halfstep.bias_shift import BiasShift
from halfstep.fake_quantize import FakeQuantize
from halfstep.graph.placement import Placement

#: Of what was fitted after a change of layers, this much is kept for each layer beside what repairs learned: a search
#: tries many assignments, and each rounding takes as much memory as its weight.
KEPT = 2


@dataclass(frozen=True)
class Place:
    """Where a quantized layer has its compensations.

    Attributes:
        lineage: what is quantized in the layer and before it; see :func:`.lineages`.
        weight: the quantizer of its weight, which holds the rounding; None if it has none of its own.
        shift: on its bias; None if it has no bias.
        bias: its float bias.
    """

    lineage: str
    weight: FakeQuantize | None
    shift: BiasShift | None
    bias: Tensor | None

    @property
    def bits(self) -> int:
        """The width of its weight; 0 without one of its own."""
        return 0 if self.weight is None else self.weight.format.bits

    def base(self) -> tuple[Tensor, ...]:
        """What compensations rest on beside the lineage: the range and the bias."""
        range = () if self.weight is None else (self.weight.scale, self.weight.zero_point)
        return tuple(part.detach().cpu().clone() for part in (*range, self.bias) if part is not None)

    def learned(self) -> Learned:
        """What is in force."""
        offset = None if self.weight is None else self.weight.offset
        shift = None if self.shift is None or not bool(self.shift.shift.any()) else self.shift.shift.clone()
        return Learned(offset, shift, self.base(), self.bits)

    def put(self, learned: Learned | None) -> None:
        """Let what was learned be in force; None for nothing."""
        if self.weight is not None:
            self.weight.offset = None if learned is None else learned.offset
        if self.shift is not None:
            self.shift.shift.zero_()
            if learned is not None and learned.shift is not None:
                self.shift.shift.copy_(learned.shift)


@dataclass(frozen=True, eq=False)
class Learned:
    """A layer's compensations for one lineage.

    Attributes:
        offset: what the rounding adds to the weight; None without one.
        shift: of the bias; None without one.
        base: what it rests on; with another range or bias it is worth nothing.
        bits: the width of the weight, which has a range for each.
    """

    offset: Tensor | None
    shift: Tensor | None
    base: tuple[Tensor, ...]
    bits: int = 0

    @property
    def empty(self) -> bool:
        """Whether the layer is better off without any."""
        return self.offset is None and self.shift is None

    def rests_on(self, base: tuple[Tensor, ...]) -> bool:
        """Whether range and bias are those that it was learned for."""
        return len(base) == len(self.base) and all(map(torch.equal, base, self.base))

    def same(self, other: Learned) -> bool:
        """Whether it is the very same rounding and an equal shift."""
        if self.shift is None or other.shift is None:
            return self.offset is other.offset and self.shift is other.shift
        return self.offset is other.offset and torch.equal(self.shift, other.shift)


def places(
    graph: fx.Graph,
    placement: Placement,
    sites: Mapping[str, FakeQuantize],
    shifts: Mapping[str, BiasShift],
    parameter: Callable[[str], Tensor],
) -> dict[str, Place]:
    """Where the layers of a placement may have compensations, by their names."""
    lineage, found = lineages(graph, placement), {}
    readers = Counter(name for layer in placement.layers for name in layer.sites)
    for layer in placement.layers:
        weight, bias = (
            "" if node is None else str(node.target) for node in (layer.operator.weight, layer.operator.bias)
        )
        site = sites.get(weight) if readers[weight] == 1 else None
        shift = shifts.get(layer.name)
        if site is not None or shift is not None:
            found[layer.name] = Place(lineage[layer.name], site, shift, parameter(bias) if bias else None)
    return found


class Compensations:
    """The compensations of a model, for every assignment of its layers that some were learned for.

    Args:
        find: the layers that may have any, as they are placed now.

    Attributes:
        missing: the layers that have learned something, or are asked to, but nothing for what comes before them now.
        asked: the layers that are to learn what there is to learn, a rounding and a shift, though no repair has taught
            them any.
    """

    def __init__(self, find: Callable[[], Mapping[str, Place]]) -> None:
        self.find = find
        self.missing: frozenset[str] = frozenset()
        self.asked: frozenset[str] = frozenset()
        self._learned: dict[str, dict[str, Learned]] = {}  # by layer, then by lineage, the latest last
        self._anew: dict[str, list[Learned]] = {}  # of these, what was fitted after a change of layers

    def copy(self, find: Callable[[], Mapping[str, Place]]) -> Compensations:
        """The same of a copy of the model."""
        twin = Compensations(find)
        twin.missing, twin.asked = self.missing, self.asked
        twin._learned = {name: dict(known) for name, known in self._learned.items()}
        twin._anew = {name: list(some) for name, some in self._anew.items()}
        return twin

    @contextmanager
    def following(self) -> Iterator[None]:
        """Change the layers' assignment in the block: what is in force is put away, and what fits the new one is."""
        self._put_away()
        yield
        self._take_out()

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Do without any for the length of a block, in which the layers' assignment may change and stay changed."""
        self._put_away()
        learned, self._learned = self._learned, {}
        self._take_out()
        try:
            yield
        finally:
            self._learned = learned
            self._take_out()

    def kinds(self, name: str) -> tuple[bool, bool]:
        """Whether a rounding was learned, or is asked, for a layer, and whether a shift, whatever came before it."""
        known = self._learned.get(name, {}).values()
        if name in self.asked:
            place = self.find()[name]
            return place.weight is not None, place.shift is not None
        return any(one.offset is not None for one in known), any(one.shift is not None for one in known)

    def settle(self, anew: Iterable[str] = ()) -> None:
        """Say that what is in force is what is wanted for the assignment of now.

        Args:
            anew: layers whose compensations were fitted after a change of layers, and may be forgotten in time.
        """
        self.missing = frozenset()
        found = self.find()
        for name in anew:
            self._anew.setdefault(name, []).append(self._remember(name, found[name]))

    def forget(self) -> None:
        """Forget all that is not in force."""
        self._learned, self._anew, self.missing = {}, {}, frozenset()

    def _put_away(self) -> None:
        for name, place in self.find().items():
            now = place.learned()
            if not now.empty or (name in self._learned and name not in self.missing):
                self._remember(name, place)

    def _remember(self, name: str, place: Place) -> Learned:
        """Keep what is in force in a layer, and of what was fitted anew only the last."""
        now, known = place.learned(), self._learned.setdefault(name, {})
        before = known.pop(place.lineage, None)
        known[place.lineage] = now = before if before is not None and before.same(now) else now
        self._anew[name] = anew = [one for one in self._anew.get(name, []) if one in known.values()]
        for lineage in [lineage for lineage, one in known.items() if one in anew][:-KEPT]:
            del known[lineage]
        return now

    def _take_out(self) -> None:
        missing = set()
        for name, place in self.find().items():
            known = self._learned.get(name, {})
            base = place.base() if known else ()
            bits = place.bits
            for lineage in [
                lineage for lineage, one in known.items() if one.bits == bits and not one.rests_on(base)
            ]:
                del known[lineage]
            place.put(known.get(place.lineage))
            taught = name in self.asked or not all(one.empty for one in known.values())
            if place.lineage not in known and taught:
                missing.add(name)
        self.missing = frozenset(missing)


def lineages(graph: fx.Graph, placement: Placement) -> Mapping[str, str]:
    """A digest for every layer of what is quantized in it and on the way to it, and in which formats.

    Two placements on one graph give a layer the same digest if what it reads is made in the same way in both: its own
    weight and inputs, and those of all that they are computed from. What comes behind it makes no difference.

    Args:
        graph: the float graph.
        placement: on it.

    Returns:
        16 hexadecimal digits by the layer's name, for layers in float too.
    """
    seen: dict[tuple[fx.Node, fx.Node], str] = {}
    for site in placement.sites:
        kind = f"{site.format!r} {site.granularity!r} {site.dynamic}"
        for position in site.positions:
            seen.update({(position.value, reader): kind for reader in position.readers})
    digests: dict[fx.Node, str] = {}
    for node in graph.nodes:
        read = [(digests[value], seen.get((value, node), "")) for value in node.all_input_nodes]
        digests[node] = hashlib.blake2b(repr((node.name, read)).encode(), digest_size=8).hexdigest()
    return {layer.name: digests[layer.operator.node] for layer in placement.layers}
