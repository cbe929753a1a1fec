"""Which operators of a network compute on integers: layers by a target's table and a recipe, and what joins them."""

from __future__ import annotations

from torch import fx

from halfstep.granularity import PerGroup
from halfstep.graph.layer_precision import LayerPrecision
from halfstep.graph.operators import (
    Operator,
    attends_to_all,
    constant_operands,
    describe,
    ends,
    readable_names,
)
from halfstep.graph.pair_sums import PairSums
from halfstep.graph.placement import group_size, takes_run_time_ranges
from halfstep.graph.tails import TAIL
from halfstep.recipe import LayerSpec, Recipe, TensorSpec
from halfstep.targets import Target


class Selection:
    """The operators of a graph, and which of them compute on codes: steps 1 and 2 of :func:`.place`.

    Attributes:
        names: readable ones, of nodes.
        operators: by node.
        asked: what the recipe asks of each layer; None leaves it in float.
        specs: the same, with what ``precision`` says of single layers.
        portable: what holds for processors that add pairs of products in 16 bits; None if the recipe does not care.
        reasons: why a layer, or what could join layers, is in float.
        integer: operators whose activations are quantized.
        kernels: those of them that the target executes as integers.
        islands: layers whose activations get their range at run time.
        misread: values that the target takes wrongly for codes, moved or not.
    """

    def __init__(self, graph: fx.Graph, target: Target, recipe: Recipe, precision: LayerPrecision) -> None:
        self.graph, self.target, self.recipe, self.precision = graph, target, recipe, precision
        self.names = readable_names(graph)
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
        self.integer: set[fx.Node] = set()
        self.kernels: set[fx.Node] = set()
        self.islands: set[fx.Node] = set()
        self.misread: set[fx.Node] = set()
        handed_on = self._moving | {"concat"}
        for node, op in self.operators.items():
            moved = op.kind in handed_on and not self.misread.isdisjoint(op.inputs)
            if moved or op.kind in target.misread:
                self.misread.add(node)
        self._choose_layers()
        self._choose_followers()

    def _is_layer(self, op: Operator) -> bool:
        return op.kind in self.target.layers or op.weight is not None

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
            elif self._uncut(op, spec):
                self.reasons[node] = (
                    f"its inputs cannot be cut into equal groups of about the size asked for, as {self.target.name} "
                    "takes them"
                )
            elif spec.activations is None:
                continue
            elif op.weight is None and self.portable and self.portable.saturates(spec.activations):
                self.reasons[node] = (
                    "multiplies two activations, which sums of 16 bits in processors without VNNI have no room for; a "
                    "portable recipe leaves it in float"
                )
            elif not self.misread.isdisjoint(op.inputs):
                self.reasons[node] = (
                    f"reads the largest or smallest of values, which {self.target.name} takes wrongly"
                )
            elif not spec.activations.dynamic:
                self.integer.add(node)
            elif takes_run_time_ranges(op, self.target):
                self.islands.add(node)
            else:
                self.reasons[node] = (
                    f"{op.kind} has no kernel on {self.target.name} that takes ranges at run time; left in float"
                )

    def _uncut(self, op: Operator, spec: LayerSpec) -> bool:
        """Whether a weight is to be in groups that the target does not take."""
        weights = spec.weights
        if op.weight is None or weights is None or not isinstance(weights.granularity, PerGroup):
            return False
        return not group_size(weights, op, ragged=self.target.packed)

    def _choose_followers(self) -> None:
        followers = {
            node
            for node, op in self.operators.items()
            if op.kind in self.target.followers
            and TAIL not in node.meta
            and self.misread.isdisjoint(op.inputs)
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
        written = [self.after_absorbed(node)] if self.target.kernel(op.kind).output else []
        return all(self.readable(value) for value in (*self.arguments(node), *written))

    def readable(self, value: fx.Node) -> bool:
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
        return enough(map(self._supplied, self.arguments(node)))

    def arguments(self, node: fx.Node) -> tuple[fx.Node, ...]:
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

    def after_absorbed(self, node: fx.Node) -> fx.Node:
        """The ReLU or clip that disappears into what makes ``node``; itself if there is none."""
        users = list(node.users)
        if len(users) == 1 and (op := self.operators.get(users[0])) and op.kind in self.target.absorbed:
            return self.after_absorbed(users[0])
        return node
