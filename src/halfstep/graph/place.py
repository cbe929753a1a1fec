"""Placement: which tensors get a quantizer, from a target's table and a recipe.

The simulated graph has a quantizer exactly where the exported file has a QuantizeLinear/DequantizeLinear pair.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import fx

from halfstep.formats import Format
from halfstep.granularity import Granularity, PerGroup
from halfstep.graph.biases import stored_biases
from halfstep.graph.layer_precision import LayerPrecision
from halfstep.graph.operators import (
    nonnegative,
)
from halfstep.graph.placement import (
    FloatOperator,
    Follower,
    Layer,
    Placement,
    Position,
    Site,
    activation_granularity,
    weight_granularity,
    wide_name,
)
from halfstep.graph.selection import Selection
from halfstep.graph.states import states_in
from halfstep.graph.tails import TAIL
from halfstep.recipe import ACTIVATIONS, LayerSpec, Recipe, TensorSpec
from halfstep.targets import Target


def place(graph: fx.Graph, target: Target, recipe: Recipe, precision: LayerPrecision) -> Placement:
    """Decide which tensors of ``graph`` are quantized.

    1. Layers whose kind is in the target's table and whose spec asks for it are integer.
    2. Followers (add, pools ...) join them while everything they read comes from an integer kernel and something
       that reads them is one.
    3. Every input of an integer operator is quantized, and every output that its kernel must quantize, after the
       ReLU or clip that disappears into it.
    4. Operators that only move codes about carry the same scale on both sides.
    5. What is marked as a tail (see :mod:`.tails`) is in float.
    6. Layers whose activations get their range at run time are islands: they read floats through a quantizer of their
       own and write floats, unless the operator before must write codes anyway, which they then read.

    A value has the widest format that a layer reads it in. Where the target does not execute that, neither the layers
    that read the value nor the operator that makes it runs on an integer kernel: what they write is not quantized for
    its own sake, and no follower joins them. No kernel needs more, and every further quantizer costs accuracy.

    Args:
        graph: a captured, folded graph.
        target: the runtime's table.
        recipe: layer-name patterns to specs.
        precision: layers that are not as the recipe has them.
    """
    return _Placer(Selection(graph, target, recipe, precision)).run()


class _Placer:
    def __init__(self, selection: Selection) -> None:
        self.selection, self.graph, self.target = selection, selection.graph, selection.target
        self.names, self.operators = selection.names, selection.operators
        self.order = {node: index for index, node in enumerate(selection.graph.nodes)}
        self.specs, self.asked, self.integer = selection.specs, selection.asked, selection.integer
        self.root: dict[fx.Node, fx.Node] = {}  # value -> the value whose scale it shares
        self.site_names: dict[fx.Node, str] = {}  # root -> the name of its site

    def run(self) -> Placement:
        self._choose_values()
        sites = (*self._activation_sites(), *self._run_time_sites(), *self._weight_sites())
        layers = self._layers()
        biases = tuple(stored_biases(layers, sites, self.target))
        return Placement(sites, layers, self._float_operators(), self._followers(), biases)

    # 3 and 4: which values

    def _choose_values(self) -> None:
        self.quantized: dict[fx.Node, bool] = {}  # value -> whether every reader must see it quantized
        for node in self.integer:
            for value in self._read_as_codes(node):
                self.quantized.setdefault(value, False)
        for node in self.selection.kernels:
            if self.target.kernel(self.operators[node].kind).output:
                self.quantized[self.selection.after_absorbed(node)] = True
        self._lift()
        self._join_states()

    def _read_as_codes(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """The inputs that an integer operator reads quantized: all but the one whose layer computes it too."""
        op = self.operators[node]
        if not self.target.kernel(op.kind).joins:
            return self.selection.arguments(node)
        makers = [
            value
            for value in op.inputs
            if value in self.integer and value in self.specs and len(value.users) == 1
        ]
        # The last of them has the other at hand.
        joined = max(makers, key=self.order.__getitem__, default=None)
        return tuple(value for value in op.inputs if value is not joined)

    def _lift(self) -> None:
        """Quantize before a pass where all that reads its input wants codes, and tie both sides together."""
        # From the end: whether a pass moves codes depends on what its readers want, further passes among them.
        for node in reversed(self.graph.nodes):
            op = self.operators.get(node)
            if op is None or op.kind not in self.target.passes - {"item"} or len(op.inputs) != 1:
                continue
            source = op.inputs[0]
            results = list(node.users) if op.kind == "split" else [node]
            if not results or not all(
                result in self.quantized and self.selection.readable(result) for result in results
            ):
                continue
            if source not in self.quantized:
                # An input of the network is quantized where it is used: the file keeps taking floats.
                if source.op == "placeholder" or not all(map(self._reads_codes, source.users)):
                    continue
                self.quantized[source] = False
            self.root.update(dict.fromkeys(results, source))

    def _join_states(self) -> None:
        """One quantizer for a state that comes in and the one that goes out, which is the next one to come in.

        Rounded once more it stays what it is, and its range is that of the states that really come, whatever those are
        that calibration begins with.
        """
        self.state: dict[fx.Node, fx.Node] = {}  # root -> the root whose quantizer it has
        self.returned: set[fx.Node] = set()
        for source, value in states_in(self.graph):
            read = [each for each in (source, *self._moved_from(source)) if each in self.quantized]
            if not read or value not in self.operators or TAIL in value.meta:
                continue
            self.quantized.setdefault(value, False)
            self.returned.add(value)
            home = self._home(read[0])
            for other in map(self._home, (*read[1:], value)):
                if other is not home:
                    self.state[other] = home

    def _moved_from(self, value: fx.Node) -> Iterator[fx.Node]:
        """What is made of ``value`` by moving it about: a layer's part of a state, say."""
        for user in value.users:
            op = self.operators.get(user)
            if op is not None and op.kind in self.target.passes:
                yield user
                yield from self._moved_from(user)

    def _home(self, value: fx.Node) -> fx.Node:
        """The value whose site a value has."""
        value = self._root(value)
        while value in self.state:
            value = self.state[value]
        return value

    def _reads_codes(self, user: fx.Node) -> bool:
        if user in self.integer:
            return True
        op = self.operators.get(user)
        if op is None or op.kind not in self.target.passes:
            return False
        results = user.users if op.kind == "split" else [user]
        return bool(results) and all(result in self.quantized for result in results)

    def _root(self, value: fx.Node) -> fx.Node:
        while value in self.root:
            value = self.root[value]
        return value

    # the records

    def _activation_sites(self) -> list[Site]:
        members: dict[fx.Node, list[fx.Node]] = {}
        for value in self.graph.nodes:
            if value in self.quantized:
                members.setdefault(self._home(value), []).append(value)
        sites = []
        for root, values in members.items():
            positions = []
            for value in values:
                readers = [
                    user
                    for user in value.users
                    if self.quantized[value]
                    or self._reads_codes(user)
                    or (user.op == "output" and value in self.returned)
                ]
                positions.append(Position(value, tuple(readers), tied=value in self.root))
            spec = self._activation_spec(values)
            granularity = activation_granularity(spec, self.names[root], values)
            negative = any(map(self._negative, values)) and not any(map(self._affine, values))
            fmt = self.target.activation_format(spec, negative)
            wide = any(self._widened(reader) for value in values for reader in value.users)
            self.site_names[root] = name = wide_name(self.names[root]) if wide else self.names[root]
            sites.append(Site(name, fmt, granularity, tuple(positions), is_weight=False, wide=wide))
        return sites

    def _widened(self, node: fx.Node) -> bool:
        """Whether a layer reads more bits than the recipe asks for."""
        spec, asked = self.specs.get(node), self.asked.get(node)
        return (
            node in self.integer
            and spec is not None
            and asked is not None
            and spec.activations != asked.activations
        )

    def _negative(self, value: fx.Node) -> bool:
        """Whether a value may be negative, or is joined with one that may: a concat reads one flavour of codes."""
        concats = [op for user in value.users if (op := self.operators.get(user)) and op.kind == "concat"]
        joined = [value, *(source for op in concats for source in op.inputs)]
        return not all(nonnegative(source, self.operators) for source in joined)

    def _affine(self, value: fx.Node) -> bool:
        """Whether the kernel that makes ``value``, directly or moved, wants codes with a zero point."""
        op = self.operators.get(value)
        if op is None:
            return False
        kernel = self.target.followers.get(op.kind)
        moved = op.kind in self.target.passes and any(map(self._affine, op.inputs))
        return moved or (kernel is not None and kernel.affine)

    def _run_time_sites(self) -> list[Site]:
        """One site for each value and granularity that islands read, but where the value is codes already."""
        readers: dict[tuple[fx.Node, Granularity], list[fx.Node]] = {}
        for node in self.specs:
            if node not in self.selection.islands:
                continue
            spec = self._activations(node)
            for value in self.operators[node].inputs:
                if not self.quantized.get(value):
                    readers.setdefault((value, spec.granularity or ACTIVATIONS), []).append(node)
        sites, self.run_time_names = [], {}
        for (value, granularity), users in readers.items():
            name = f"{self.names[value]}:{_run_time_suffix(granularity)}"
            fmt = self.target.activation_format(self._activations(users[0]))
            sites.append(Site(name, fmt, granularity, (Position(value, tuple(users)),), False, dynamic=True))
            self.run_time_names.update(dict.fromkeys(users, name))
        return sites

    def _activations(self, island: fx.Node) -> TensorSpec:
        spec = self.specs[island]
        assert spec is not None and spec.activations is not None
        return spec.activations

    def _activation_spec(self, values: list[fx.Node]) -> TensorSpec:
        """The widest spec of the layers that read the values; else of the nearest layer that made them."""
        specs = [
            spec.activations
            for value in values
            for reader in value.users
            if reader in self.integer and (spec := self.specs.get(reader)) and spec.activations
        ]
        node: fx.Node | None = values[0]
        while not specs and node is not None:
            made_by = self.specs.get(node)
            if made_by is not None and made_by.activations is not None:
                specs = [made_by.activations]
            inputs = self.operators[node].inputs if node in self.operators else ()
            node = inputs[0] if inputs else None
        return max(specs, key=lambda spec: spec.bits) if specs else TensorSpec(8)

    def _weight_sites(self) -> list[Site]:
        readers: dict[str, list[fx.Node]] = {}
        nodes: dict[str, fx.Node] = {}
        for node, spec in self.specs.items():
            weight = self.operators[node].weight
            if weight is None or spec is None or spec.weights is None or node in self.selection.reasons:
                continue
            name = str(weight.target)
            nodes.setdefault(name, weight)
            readers.setdefault(name, []).append(node)
        sites = []
        for name, users in readers.items():
            op = self.operators[users[0]]
            granularity = weight_granularity(self._widest(self.specs, users), op, self.target.packed)
            fmt, usual = (self._weight_format(specs, users) for specs in (self.specs, self.asked))
            by_node: dict[fx.Node, list[fx.Node]] = {}
            for user in users:
                weight = self.operators[user].weight
                assert weight is not None
                by_node.setdefault(weight, []).append(user)
            positions = tuple(Position(w, tuple(us), tied=w is not nodes[name]) for w, us in by_node.items())
            on_request = None if fmt == usual else usual
            sites.append(Site(name, fmt, granularity, positions, is_weight=True, usual=on_request))
        self.weight_names = {user: name for name, users in readers.items() for user in users}
        return sites

    def _widest(self, specs: Mapping[fx.Node, LayerSpec | None], users: list[fx.Node]) -> TensorSpec:
        """What the reader of a weight asks of it that asks for most."""
        asked = [spec.weights for user in users if (spec := specs[user]) and spec.weights]
        return max(asked, key=lambda spec: spec.bits)

    def _weight_format(self, specs: Mapping[fx.Node, LayerSpec | None], users: list[fx.Node]) -> Format:
        """The format of a weight, by these specs of the layers that read it."""
        fmt = self.target.weight_format(self._widest(specs, users))
        if self.selection.portable is None:
            return fmt
        return min(
            (self.selection.portable.weight_format(fmt, user) for user in users), key=lambda each: each.bits
        )

    def _layers(self) -> tuple[Layer, ...]:
        layers = []
        for node in self.specs:
            op = self.operators[node]
            sites = []
            if node in self.run_time_names:
                sites.append(self.run_time_names[node])
            elif node in self.integer | self.selection.islands:
                sites += [self.site_names[self._home(value)] for value in op.inputs]
            if node in self.weight_names:
                sites.append(self.weight_names[node])
            layers.append(Layer(self.names[node], op, tuple(sites), self.selection.reasons.get(node, "")))
        return tuple(layers)

    def _followers(self) -> tuple[Follower, ...]:
        return tuple(
            Follower(self.names[node], op)
            for node, op in self.operators.items()
            if node in self.integer and node not in self.specs
        )

    def _float_operators(self) -> tuple[FloatOperator, ...]:
        silent = self.target.passes | self.target.absorbed
        found = []
        for node, op in self.operators.items():
            if node in self.specs or node in self.integer or op.kind in silent:
                continue
            unknown = f"{op.kind} is not in the table of {self.target.name}; it runs in float"
            reason = (
                node.meta.get(TAIL)
                or self.selection.reasons.get(node)
                or self.target.reasons.get(op.kind, unknown)
            )
            found.append(FloatOperator(self.names[node], op, reason))
        return tuple(found)


def _run_time_suffix(granularity: Granularity) -> str:
    """Sets a site apart from one with a fixed range on the same tensor."""
    return f"groups_{granularity.size}" if isinstance(granularity, PerGroup) else "dynamic"
