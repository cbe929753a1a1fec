"""Functions of a file: calls in which nothing was quantized stay calls, the others are written out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedFunctionsPass

from halfstep.export.editing import producer
from halfstep.onnx_in.reader import CALL, OnnxGraph, load, version


class Calls:
    """The calls of functions in a graph that is read with its functions inlined.

    Args:
        model: with every call written out, and nothing else changed yet.
        message: that it was read from.
    """

    def __init__(self, model: ir.Model, message: onnx.ModelProto) -> None:
        self.model, self.message = model, message
        self.read: dict[str, dict[ir.Node, tuple[ir.Value | None, ...]]] = {}
        for node in model.graph:
            if (call := node.metadata_props.pop(CALL, None)) is not None:
                self.read.setdefault(call, {})[node] = tuple(node.inputs)
        nodes = [node for each in self.read.values() for node in each]
        self.names = {value: value.name for node in nodes for value in (*node.inputs, *node.outputs) if value}

    def restore(self) -> None:
        """Put the calls back whose nodes are what they were, and the functions that are called."""
        if not self.read:
            return
        original = ir.from_proto(self.message)
        restored = [
            self._restore(original.graph[int(call)], nodes)
            for call, nodes in self.read.items()
            if all(node.graph is self.model.graph for node in nodes)
        ]
        if any(restored):
            self.model.functions.update(original.functions)
            RemoveUnusedFunctionsPass()(self.model)  # type: ignore[no-untyped-call]
            self.model.graph.sort()

    def _restore(self, call: ir.Node, nodes: dict[ir.Node, tuple[ir.Value | None, ...]]) -> bool:
        """Put one call in place of its nodes, if what they read from outside is the same, under whatever name."""
        given: dict[ir.Value, ir.Value] = {}
        for node, before in nodes.items():
            if len(node.inputs) != len(before):
                return False
            for old, now in zip(before, node.inputs, strict=True):
                if old is None or now is None or old.producer() in nodes or now.producer() in nodes:
                    if old is not now:
                        return False
                elif given.setdefault(old, now) is not now or (
                    producer(now, "DequantizeLinear") and old is not now
                ):
                    return False
        made = {self.names[value]: value for node in nodes for value in node.outputs}
        results = [made.get(value.name) for value in call.outputs]
        wanted = {value for value in results if value is not None}
        for node in nodes:
            for value in node.outputs:
                used = value.is_graph_output() or any(user not in nodes for user, _ in value.uses())
                if used and value not in wanted:
                    return False
        by_name = {self.names[value]: now for value, now in given.items()}
        known = {
            value.name: value for value in (*self.model.graph.inputs, *self.model.graph.initializers.values())
        }
        inputs = [
            None if value is None else by_name.get(value.name) or known.get(value.name)
            for value in call.inputs
        ]
        if any(value is not None and new is None for value, new in zip(call.inputs, inputs, strict=True)):
            return False
        new = ir.Node(
            call.domain,
            call.op_type,
            inputs,
            call.attributes.values(),
            overload=call.overload,
            num_outputs=len(call.outputs),
            name=call.name,
            metadata_props=dict(call.metadata_props),
        )
        pairs = [(old, value) for old, value in zip(results, new.outputs, strict=True) if old is not None]
        ir.convenience.replace_nodes_and_values(
            self.model.graph,
            list(nodes)[-1],
            list(nodes),
            [new],
            [old for old, _ in pairs],
            [value for _, value in pairs],
        )
        return True


def changes(source: OnnxGraph, file: Path) -> list[str]:
    """What became of a file's version and functions in the one that was written, one sentence each."""
    before, after = source.given, load(file)
    versions = [version(before, source.path), version(after, file)]
    said = []
    if versions[0] != versions[1]:
        said.append(
            f"The file's operator set {versions[0]} became {versions[1]}: older ones lack what its quantizers need, or "
            "are older than what is read"
        )
    functions = {function.name for function in before.functions}
    called = [
        Counter(node.op_type for node in m.graph.node if node.op_type in functions) for m in (before, after)
    ]
    for name, count in called[0].items():
        if opened := count - called[1][name]:
            said.append(
                f"{opened} of {count} calls of the file's function {name!r} are written out as the nodes in them, "
                "which are quantized, or brought to another version"
            )
    return said
