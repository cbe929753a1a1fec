"""Blocks of layers that are repaired together: what a skip spans, the module around it, or a layer by itself.

A skip is an addition of two activations that come from one: all that lies between is a block, for whatever the one way
loses the other may make up for. Where a module's code holds it and nothing else of the network, the module is the
block: with its activations and norms, and of a transformer with attention and MLP together.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import fx

from halfstep.errors import ArgumentError
from halfstep.graph.operators import describe
from halfstep.graph.placement import Layer
from halfstep.model import QuantizedModel

#: Kinds that belong to the layer before them: one value in, one out.
ACTIVATIONS = frozenset(
    {"relu", "clip", "leaky_relu", "sigmoid", "silu", "hardswish", "hardsigmoid", "gelu", "tanh"}
)


@dataclass(frozen=True)
class Block:
    """Nodes of the float graph that no way leaves and enters again.

    Attributes:
        name: of the module, the layer, or the first and the last layer.
        nodes: in the order of execution.
        layers: the quantized ones among them that have a weight.
        entries: the tensors from outside that it reads, parameters left out.
        sizes: nodes outside that make what is no tensor of entries: computed anew for other examples.
        outputs: the nodes whose tensors are read outside.
    """

    name: str
    nodes: tuple[fx.Node, ...]
    layers: tuple[Layer, ...]
    entries: tuple[fx.Node, ...]
    sizes: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


def find_blocks(model: QuantizedModel, given: Iterable[str] | None = None) -> list[Block]:
    """The blocks of a network, in the order of execution; every quantized layer with a weight is in one.

    Args:
        model: any.
        given: paths of modules or shell-style patterns of them, each of which is a block then; the layers outside are
            blocks by themselves. None to find them.

    Raises:
        ArgumentError: a pattern that matches no module, a module without a quantized layer, two that overlap, or one
            that the network leaves and enters again.
    """
    finder = _Finder(model)
    chosen = finder.found() if given is None else finder.chosen(given)
    return finder.blocks(chosen)


def whole_network(model: QuantizedModel) -> Block:
    """All of a network as one block, whose outputs are the network's; it has none where they are all integers."""
    nodes = frozenset(node for node in model.graph.nodes if node.op == "call_function")
    return _Finder(model).block(nodes, "the whole network")


def in_order(graph: fx.Graph, blocks: Sequence[Block]) -> Iterator[Block | fx.Node]:
    """Blocks, and the calls in none of them, so that each comes behind all that it reads."""
    home = {node: block for block in blocks for node in block.nodes}
    done: set[fx.Node] = set()
    for start in graph.nodes:
        waiting = [start]
        while waiting:
            node = waiting[-1]
            block = home.get(node)
            nodes = (node,) if block is None else block.nodes
            missing = [
                source
                for each in nodes
                for source in each.all_input_nodes
                if source not in done and (block is None or home.get(source) is not block)
            ]
            if node in done or not missing:
                waiting.pop()
                if node not in done and node.op == "call_function":
                    yield node if block is None else block
                done.update(nodes)
            waiting += missing if node not in done else []


class _Finder:
    """The modules and skips of a graph."""

    def __init__(self, model: QuantizedModel) -> None:
        self.model, self.graph = model, model.graph
        self.order = {node: index for index, node in enumerate(self.graph.nodes)}
        self.layers = {
            layer.operator.node: layer
            for layer in model.layers
            if not layer.reason
            and layer.operator.weight is not None
            and str(layer.operator.weight.target) in model.sites
        }
        #: The nodes of each call of a module by its path, and whose class it is.
        self.members: dict[str, set[fx.Node]] = {}
        self.owner: dict[str, str] = {}
        for node in self.graph.nodes:
            if node.op == "call_function":
                for path, owner in _stack(node):
                    self.members.setdefault(path, set()).add(node)
                    self.owner[path] = owner
        self.behind = self._behind()
        self.dominators = self._dominators()

    # what there is

    def found(self) -> dict[frozenset[fx.Node], str]:
        """The sets of nodes that are blocks, with their names."""
        names: dict[frozenset[fx.Node], str] = {}
        kinds = set()
        for node in self.graph.nodes:
            skip = self._skip(node)
            if not skip:
                continue
            path = self._module(skip)
            if path:
                names[self._whole(self.members[path])] = path
                kinds.add(self.owner[path])
            else:
                names[self._whole(self._activated(skip))] = ""
        for path, called in self.members.items():  # of the same code, with no skip where the sizes differ
            if self.owner[path] in kinds and self._stands(called) and len(called & self.layers.keys()) > 1:
                names.setdefault(self._whole(called), path)
        chosen: list[frozenset[fx.Node]] = []
        for nodes in sorted(names, key=len):
            if not nodes & self.layers.keys() or self._left_and_entered(nodes):
                continue
            inner = [other for other in chosen if other & nodes]
            # What holds several blocks is a stage of the network; one that holds one is the larger block.
            if len(inner) < 2 and all(other <= nodes for other in inner):
                chosen = [other for other in chosen if other not in inner]
                chosen.append(nodes)
        return {nodes: names[nodes] for nodes in chosen}

    def chosen(self, patterns: Iterable[str]) -> dict[frozenset[fx.Node], str]:
        """The modules that a user's patterns match."""
        names: dict[frozenset[fx.Node], str] = {}
        for pattern in patterns:
            paths = [path for path in self.members if path and _matches(pattern, path)]
            if not paths:
                known = list(dict.fromkeys(path.split("@")[0] for path in self.members if path))
                near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.3) or known[:3]
                raise ArgumentError(
                    f"blocks: {pattern!r} matches no module that the network calls; the nearest are "
                    f"{', '.join(map(repr, near))}"
                )
            for path in paths:
                nodes = self._whole(self.members[path])
                if not nodes & self.layers.keys():
                    raise ArgumentError(
                        f"blocks: {path!r} has no quantized layer with a weight; leave it out"
                    )
                if self._left_and_entered(nodes):
                    raise ArgumentError(
                        f"blocks: the network leaves {path!r} and enters it again, so it has no output of its own; "
                        "give the modules inside it, or the one around it"
                    )
                for other, name in names.items():
                    if other & nodes and other != nodes:
                        raise ArgumentError(f"blocks: {name!r} and {path!r} overlap; a layer is in one block")
                names[nodes] = path
        return names

    def blocks(self, chosen: Mapping[frozenset[fx.Node], str]) -> list[Block]:
        """Records of the blocks, and of those that the layers outside of them are by themselves."""
        taken = set().union(*chosen)
        sets = dict(chosen)
        for node in self.layers:
            if node not in taken:
                sets[self._activated({node}, taken)] = ""
        found = [self.block(nodes, name) for nodes, name in sets.items()]
        found = [block for block in found if block.outputs]  # floats that somebody reads
        return sorted(found, key=lambda block: self.order[block.nodes[0]])

    def block(self, nodes: frozenset[fx.Node], name: str) -> Block:
        """The record of some nodes that are a block."""
        inside = tuple(sorted(nodes, key=self.order.__getitem__))
        layers = tuple(self.layers[node] for node in inside if node in self.layers)
        entries: dict[fx.Node, None] = {}
        sizes: set[fx.Node] = set()
        waiting = list(inside)
        while waiting:
            for source in waiting.pop().all_input_nodes:
                if source in nodes or source in sizes or source.op == "get_attr":
                    continue
                if isinstance(source.meta.get("val"), torch.Tensor) or source.op == "placeholder":
                    entries[source] = None
                else:
                    sizes.add(source)
                    waiting.append(source)
        outputs = tuple(
            node for node in inside if _is_float(node) and any(user not in nodes for user in node.users)
        )
        if not name:
            names = [layer.name for layer in layers]
            name = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        return Block(
            name.split("@")[0],
            inside,
            layers,
            tuple(sorted(entries, key=self.order.__getitem__)),
            tuple(sorted(sizes, key=self.order.__getitem__)),
            outputs,
        )

    # skips

    def _behind(self) -> set[fx.Node]:
        """The layers with a weight, quantized or not, and all that is computed from what they make."""
        operators = {layer.operator.node for layer in self.model.layers if layer.operator.weight is not None}
        found: set[fx.Node] = set()
        for node in self.graph.nodes:
            if node in operators or any(source in found for source in node.all_input_nodes):
                found.add(node)
        return found

    def _dominators(self) -> dict[fx.Node, tuple[fx.Node | None, int]]:
        """For each node behind a layer the last one that all ways to it pass, and how many such there are."""
        found: dict[fx.Node, tuple[fx.Node | None, int]] = {}

        def common(a: fx.Node | None, b: fx.Node | None) -> fx.Node | None:
            while a is not b:
                if a is None or b is None:
                    return None
                if found[a][1] >= found[b][1]:
                    a = found[a][0]
                else:
                    b = found[b][0]
            return a

        for node in self.graph.nodes:
            if node not in self.behind:
                continue
            sources = [source for source in node.all_input_nodes if source in self.behind]
            last = sources[0] if sources else None
            for source in sources[1:]:
                last = common(last, source)
            found[node] = last, 0 if last is None else found[last][1] + 1
        return found

    def _skip(self, node: fx.Node) -> set[fx.Node]:
        """What lies between an addition of two activations and the one that both come from; empty if it is none."""
        op = describe(node) if node in self.behind else None
        if op is None or op.kind != "add" or sum(source in self.behind for source in op.inputs) < 2:
            return set()
        origin = self.dominators[node][0]
        if origin is None:
            return set()
        found, waiting = {node}, [node]
        while waiting:
            for source in waiting.pop().all_input_nodes:
                if source in self.behind and source is not origin and source not in found:
                    found.add(source)
                    waiting.append(source)
        return found if found & self.layers.keys() else set()

    def _module(self, nodes: Collection[fx.Node]) -> str:
        """The path of the innermost module that holds all these nodes and is entered at one tensor; empty if none."""
        stacks = [[path for path, _ in _stack(node)] for node in nodes]
        shared = [path for path in stacks[0] if all(path in stack for stack in stacks[1:])]
        path = shared[-1] if shared else ""
        if not path or "container" in self.owner[path] or not self._stands(self.members[path]):
            return ""
        return path

    def _stands(self, nodes: Collection[fx.Node]) -> bool:
        """Whether a module reads no more than one tensor that a layer before it has a part in."""
        read = {
            source
            for node in nodes
            for source in node.all_input_nodes
            if source not in nodes
            and source in self.behind
            and isinstance(source.meta.get("val"), torch.Tensor)
        }
        return len(read) <= 1

    # sets of nodes

    def _activated(self, nodes: set[fx.Node], taken: Collection[fx.Node] = ()) -> frozenset[fx.Node]:
        """Nodes, and the activations right behind the last one that nothing else reads."""
        nodes = set(nodes)
        last = max(nodes, key=self.order.__getitem__)
        while len(last.users) == 1:
            last = next(iter(last.users))
            op = describe(last)
            if op is None or op.kind not in ACTIVATIONS or len(op.inputs) != 1 or last in taken:
                break
            nodes.add(last)
        return frozenset(nodes)

    def _whole(self, nodes: Collection[fx.Node]) -> frozenset[fx.Node]:
        """Nodes, and what picks tensors out of those that make several."""
        found = set(nodes)
        for node in sorted(found, key=self.order.__getitem__):
            if isinstance(node.meta.get("val"), (tuple, list)):
                found.update(user for user in node.users if user.op == "call_function")
        return frozenset(found)

    def _left_and_entered(self, nodes: Collection[fx.Node]) -> bool:
        """Whether some way leaves these nodes and comes back."""
        outside: set[fx.Node] = set()
        for node in self.graph.nodes:
            if node in nodes:
                if any(source in outside for source in node.all_input_nodes):
                    return True
            elif any(source in outside or source in nodes for source in node.all_input_nodes):
                outside.add(node)
        return False


def _stack(node: fx.Node) -> list[tuple[str, str]]:
    """The modules whose code a node is part of, from the outside in: path and class; the root is not one of them."""
    stack: Mapping[str, tuple[str, Any]] = node.meta.get("nn_module_stack", {})
    return [(path, str(owner)) for path, owner in stack.values() if path]


def _matches(pattern: str, path: str) -> bool:
    path = path.split("@")[0]
    return path == pattern or fnmatchcase(path, pattern)


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()
