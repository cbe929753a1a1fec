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
    Operator,
    attends_to_all,
    constant_operands,
    describe,
    ends,
    nonnegative,
    readable_names,
)
from halfstep.graph.pair_sums import PairSums
from halfstep.graph.placement import (
    FloatOperator,
    Follower,
    Layer,
    Placement,
    Position,
    Site,
    activation_granularity,
    takes_run_time_ranges,
    weight_granularity,
    wide_name,
)
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
    return _Placer(graph, target, recipe, precision).run()


class _Placer:
    def __init__(self, graph: fx.Graph, target: Target, recipe: Recipe, precision: LayerPrecision) -> None:
        self.graph, self.target, self.recipe, self.precision = graph, target, recipe, precision
        self.names = readable_names(graph)
        self.order = {node: index for index, node in enumerate(graph.nodes)}
        self.operators = {n: op for n in graph.nodes if (op := describe(n)) is not None}
        layers = [node for node, op in self.operators.items() if self._is_layer(op)]
        quantizable = [node for node in layers if TAIL not in node.meta]
        outermost = ends(graph, quantizable)
        if len(outermost) == len(quantizable):  # an exception that leaves no rule
            outermost = set()
        self.asked = {node: recipe.spec(self.names[node], node in outermost) for node in layers}
        self.specs: dict[fx.Node, LayerSpec | None] = {
            node: precision.spec(recipe, self.names[node], node in outermost) for node in layers
        }
        self._moving = target.passes | target.absorbed | target.fused
        self.portable = PairSums(target, self.operators, self.asked, self._moves) if recipe.portable else None
        self.reasons: dict[fx.Node, str] = {}
        self.integer: set[fx.Node] = set()  # operators whose activations are quantized
        self.kernels: set[fx.Node] = set()  # those of them that the target executes as integers
        self.islands: set[fx.Node] = set()  # layers whose activations get their range at run time
        self.root: dict[fx.Node, fx.Node] = {}  # value -> the value whose scale it shares
        self.site_names: dict[fx.Node, str] = {}  # root -> the name of its site

    def _is_layer(self, op: Operator) -> bool:
        return op.kind in self.target.layers or op.weight is not None

    def run(self) -> Placement:
        self._choose_layers()
        self._choose_followers()
        self._choose_values()
        sites = (*self._activation_sites(), *self._run_time_sites(), *self._weight_sites())
        layers = self._layers()
        biases = tuple(stored_biases(layers, sites, self.target))
        return Placement(sites, layers, self._float_operators(), self._followers(), biases)

    # 1 and 2: which operators

    def _choose_layers(self) -> None:
        for node, spec in self.specs.items():
            op, name = self.operators[node], self.names[node]
            if TAIL in node.meta:
                self.reasons[node] = node.meta[TAIL]
            elif name in self.precision["float"]:
                self.reasons[node] = "left in float on request, or by a search"
            elif spec is None:
                self.reasons[node] = "left in float by the recipe"
            elif op.kind in self.target.tables:
                if spec.weights is None:
                    self.reasons[node] = "a table in float by the recipe"
            elif op.kind not in self.target.layers:
                self.reasons[node] = self.target.reasons.get(
                    op.kind, f"{op.kind} has no integer kernel on {self.target.name}"
                )
            elif op.weight is None and (spec.activations is None or len(op.inputs) < 2):
                self.reasons[node] = "has no weight to quantize"
            elif spec.activations is None:
                continue
            elif op.weight is None and self.portable and self.portable.saturates(spec.activations):
                self.reasons[node] = (
                    "multiplies two activations, which sums of 16 bits in processors without VNNI have no room for; a "
                    "portable recipe leaves it in float"
                )
            elif not spec.activations.dynamic:
                self.integer.add(node)
            elif takes_run_time_ranges(op, self.target):
                self.islands.add(node)
            else:
                self.reasons[node] = (
                    f"{op.kind} has no kernel on {self.target.name} that takes ranges at run time; left in float"
                )

    def _choose_followers(self) -> None:
        followers = {
            node
            for node, op in self.operators.items()
            if op.kind in self.target.followers
            and TAIL not in node.meta
            and not (op.kind in ("add", "mul") and constant_operands(node))
            and not (op.kind == "attention" and (self.portable or not attends_to_all(node)))
        }
        # From all of them down to what holds: followers that feed one another would never join one by one.
        self.kernels = {node for node in self.integer | followers if self._executed(node)}
        while lost := {
            node for node in self.kernels - self.integer if not (self._fed(node) and self._wanted(node))
        }:
            self.kernels -= lost
        self.integer |= self.kernels
        for node in followers - self.integer:
            self.reasons[node] = "is not between integer operators: quantizing for it alone would cost time"

    def _executed(self, node: fx.Node) -> bool:
        """Whether the target executes the formats of all that an operator reads, and must write."""
        op = self.operators[node]
        written = [self._after_absorbed(node)] if self.target.kernel(op.kind).output else []
        return all(self._readable(value) for value in (*self._arguments(node), *written))

    def _readable(self, value: fx.Node) -> bool:
        """Whether the target executes the widest format that layers read ``value`` in, directly or moved."""
        specs = self._read_as(value)
        if not specs:
            return True
        widest = max(specs, key=lambda spec: spec.bits)
        return self.target.executes(self.target.activation_format(widest))

    def _read_as(self, value: fx.Node) -> list[TensorSpec]:
        found = []
        for user in value.users:
            spec = self.specs.get(user)
            if user in self.integer and spec is not None and spec.activations is not None:
                found.append(spec.activations)
            elif user not in self.specs and self._moves(user):
                found += self._read_as(user)
        return found

    def _fed(self, node: fx.Node) -> bool:
        """Whether enough of what a follower reads comes in codes."""
        op = self.operators[node]
        enough = any if self.target.kernel(op.kind).partial else all
        return enough(map(self._supplied, self._arguments(node)))

    def _arguments(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """The activations that the kernel of an operator has codes for."""
        op = self.operators[node]
        reads = self.target.kernel(op.kind).reads
        return (
            op.inputs if reads is None else tuple(value for value in op.inputs if value in node.args[:reads])
        )

    def _supplied(self, value: fx.Node) -> bool:
        """Whether ``value`` comes from an integer kernel, or is put into codes for a layer that reads it anyway.

        That goes for inputs of the network and for what float layers made. What other float operators made (a
        LayerNorm's residual stream) stays float for whoever can read it so.
        """
        if value in self.kernels:
            return True
        op = self.operators.get(value)
        if value.op == "placeholder" or self._of_layers(value):
            read_anyway = any(user in self.specs and user in self.kernels for user in value.users)
            if read_anyway or op is None:
                return read_anyway
        moved = op is not None and op.kind in self._moving
        return moved and all(map(self._supplied, self.operators[value].inputs))

    def _of_layers(self, value: fx.Node) -> bool:
        """Whether ``value`` is computed from layers by nothing that lacks an integer kernel."""
        op = self.operators.get(value)
        if op is None:
            return False
        between = op.kind in self._moving or op.kind in self.target.followers
        return op.kind in self.target.layers or (between and all(map(self._of_layers, op.inputs)))

    def _wanted(self, value: fx.Node) -> bool:
        """Whether an integer kernel reads ``value``, directly or moved."""
        return any(user in self.kernels or (self._moves(user) and self._wanted(user)) for user in value.users)

    def _moves(self, node: fx.Node) -> bool:
        op = self.operators.get(node)
        return op is not None and op.kind in self._moving

    # 3 and 4: which values

    def _choose_values(self) -> None:
        self.quantized: dict[fx.Node, bool] = {}  # value -> whether every reader must see it quantized
        for node in self.integer:
            for value in self._read_as_codes(node):
                self.quantized.setdefault(value, False)
        for node in self.kernels:
            if self.target.kernel(self.operators[node].kind).output:
                self.quantized[self._after_absorbed(node)] = True
        self._lift()
        self._join_states()

    def _read_as_codes(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """The inputs that an integer operator reads quantized: all but the one whose layer computes it too."""
        op = self.operators[node]
        if not self.target.kernel(op.kind).joins:
            return self._arguments(node)
        makers = [
            value
            for value in op.inputs
            if value in self.integer and value in self.specs and len(value.users) == 1
        ]
        # The last of them has the other at hand.
        joined = max(makers, key=self.order.__getitem__, default=None)
        return tuple(value for value in op.inputs if value is not joined)

    def _after_absorbed(self, node: fx.Node) -> fx.Node:
        users = list(node.users)
        if len(users) == 1 and (op := self.operators.get(users[0])) and op.kind in self.target.absorbed:
            return self._after_absorbed(users[0])
        return node

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
                result in self.quantized and self._readable(result) for result in results
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
            if node not in self.islands:
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
            if weight is None or spec is None or spec.weights is None or node in self.reasons:
                continue
            name = str(weight.target)
            nodes.setdefault(name, weight)
            readers.setdefault(name, []).append(node)
        sites = []
        for name, users in readers.items():
            op = self.operators[users[0]]
            granularity = weight_granularity(self._widest(self.specs, users), op)
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
        if self.portable is None:
            return fmt
        return min((self.portable.weight_format(fmt, user) for user in users), key=lambda each: each.bits)

    def _layers(self) -> tuple[Layer, ...]:
        layers = []
        for node in self.specs:
            op = self.operators[node]
            sites = []
            if node in self.run_time_names:
                sites.append(self.run_time_names[node])
            elif node in self.integer | self.islands:
                sites += [self.site_names[self._home(value)] for value in op.inputs]
            if node in self.weight_names:
                sites.append(self.weight_names[node])
            layers.append(Layer(self.names[node], op, tuple(sites), self.reasons.get(node, "")))
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
                node.meta.get(TAIL) or self.reasons.get(node) or self.target.reasons.get(op.kind, unknown)
            )
            found.append(FloatOperator(self.names[node], op, reason))
        return tuple(found)


def _run_time_suffix(granularity: Granularity) -> str:
    """Sets a site apart from one with a fixed range on the same tensor."""
    return f"groups_{granularity.size}" if isinstance(granularity, PerGroup) else "dynamic"
