"""Neighbouring nodes that are one operator for quantization: read as such, so that placement sees what it knows.

Exporters write a linear layer as a product and a sum, and GELU, LayerNorm and attention as half a dozen nodes where
their version of ONNX has no operator for them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from halfstep.onnx_in.attention import ATTEND
from halfstep.onnx_in.linear import LINEAR, OWN_DOMAIN
from halfstep.onnx_in.table import Node

#: What is put behind the name of a stored matrix that is read transposed, where another node reads it as it is.
TRANSPOSED = ":transposed"


def fuse(
    nodes: tuple[Node, ...], stored: Mapping[str, np.ndarray], outputs: tuple[str, ...]
) -> tuple[tuple[Node, ...], dict[str, np.ndarray]]:
    """The nodes, with those that make one operator as one, which has the name of the one that multiplies.

    Args:
        nodes: in the order of execution.
        stored: tensors by name.
        outputs: names of the network's outputs, which are made whatever happens.

    Returns:
        The nodes, and the stored tensors, of which the weights of linear layers are (outputs, inputs).
    """
    work = _Fusion(nodes, stored, outputs)
    for node in nodes:
        for pattern in (work.layer_norm, work.gelu, work.attention, work.linear):
            if node.name in work.nodes and pattern(node):
                break
    return work.result()


class _Fusion:
    def __init__(
        self, nodes: tuple[Node, ...], stored: Mapping[str, np.ndarray], outputs: tuple[str, ...]
    ) -> None:
        self.nodes = {node.name: node for node in nodes}  # a fused node stands where its last one stood
        self.stored, self.outputs = dict(stored), frozenset(outputs)
        self.makers = {name: node.name for node in nodes for name in node.outputs if name}
        self.readers: dict[str, list[str]] = {}
        for node in nodes:
            for name in dict.fromkeys(node.inputs):
                self.readers.setdefault(name, []).append(node.name)
        self.transposed: dict[str, str] = {}

    def result(self) -> tuple[tuple[Node, ...], dict[str, np.ndarray]]:
        """Nodes with their weights turned."""
        reading = [node for node in self.nodes.values() if node.domain != OWN_DOMAIN]
        as_they_are = {name for node in reading for name in node.inputs}
        final = dict(self.stored)
        names = {}
        for name in self.transposed:
            names[name] = f"{name}{TRANSPOSED}" if name in as_they_are else name
            final[names[name]] = np.ascontiguousarray(self.stored[name].T)
        nodes = tuple(
            replace(node, inputs=(node.inputs[0], names[node.inputs[1]], *node.inputs[2:]))
            if node.op_type == LINEAR and node.domain == OWN_DOMAIN and node.get("turned")
            else node
            for node in self.nodes.values()
        )
        return nodes, final

    # the patterns

    def linear(self, node: Node) -> bool:
        """A Gemm, or a MatMul and the Add of a vector behind it, by a stored matrix."""
        if node.domain or node.op_type not in ("MatMul", "Gemm") or len(node.inputs) < 2:
            return False
        weight = self.stored.get(node.inputs[1])
        if weight is None or weight.ndim != 2 or weight.dtype.kind != "f":
            return False
        bias, turned = "", True
        parts: tuple[Node, ...] = (node,)
        if node.op_type == "Gemm":
            bias = node.inputs[2] if len(node.inputs) > 2 else ""
            plain = all(node.get(factor, 1.0) == 1.0 for factor in ("alpha", "beta")) and not node.get(
                "transA", 0
            )
            if not plain or (bias and not self._vector(bias) and not self._row(bias)):
                return False
            turned = not node.get("transB", 0)
        else:
            after = self._reader(node, "Add")
            if after is None or not self._vector(bias := self._other(after, node.outputs[0])):
                return False
            parts = (node, after)
        if bias and self.stored[bias].size != weight.shape[1 if turned else 0]:
            return False
        if turned:
            self.transposed[node.inputs[1]] = ""
        if bias:
            self.stored[bias] = self.stored[bias].reshape(-1)
        inputs = (node.inputs[0], node.inputs[1], *([bias] if bias else []))
        self._join(parts, LINEAR, inputs, {"turned": turned}, node.name)
        return True

    def gelu(self, node: Node) -> bool:
        """``0.5 * x * (1 + erf(x / sqrt(2)))`` in whichever order."""
        if node.op_type != "Erf" or (scaled := self._maker(node.inputs[0])) is None:
            return False
        factor = self._factor(scaled)
        if factor is None or not math.isclose(factor, math.sqrt(0.5), rel_tol=1e-4):
            return False
        x = self._operand(scaled)
        shifted = self._reader(node, "Add")
        if shifted is None or self._number(self._other(shifted, node.outputs[0])) != 1.0:
            return False
        product = self._reader(shifted, "Mul")
        if product is None:
            return False
        other = self._other(product, shifted.outputs[0])
        half = self._maker(other)
        if self._factor(product) == 0.5:
            end = self._reader(product, "Mul")
            if end is None or self._other(end, product.outputs[0]) != x:
                return False
            parts: tuple[Node, ...] = (scaled, node, shifted, product, end)
        elif other == x:
            end = self._reader(product, "Mul") or self._reader(product, "Div")
            if end is None or self._factor(end) != 0.5:
                return False
            parts = (scaled, node, shifted, product, end)
        elif (
            half is not None and self._factor(half) == 0.5 and self._operand(half) == x and self._alone(half)
        ):
            parts = (scaled, node, half, shifted, product)
        else:
            return False
        return self._join(parts, "Gelu", (x,), {}, node.name, "")

    def layer_norm(self, node: Node) -> bool:
        """``(x - mean) / sqrt(mean((x - mean)^2) + eps)`` over the last axis, with a gain and a shift behind it."""
        root = self._maker(node.inputs[1]) if node.op_type == "Div" and len(node.inputs) == 2 else None
        padded = self._maker(root.inputs[0]) if root is not None and root.op_type == "Sqrt" else None
        if root is None or padded is None or padded.op_type != "Add":
            return False
        epsilon = next((v for name in padded.inputs if (v := self._number(name)) is not None), None)
        spread = next((m for name in padded.inputs if (m := self._maker(name)) is not None), None)
        if epsilon is None or spread is None or not self._over_last(spread):
            return False
        square, centred = self._maker(spread.inputs[0]), self._maker(node.inputs[0])
        if square is None or centred is None or centred.op_type != "Sub":
            return False
        d = centred.outputs[0]
        squared = square.op_type == "Pow" and square.inputs[0] == d and self._number(square.inputs[1]) == 2.0
        if not squared and not (square.op_type == "Mul" and square.inputs == (d, d)):
            return False
        mean = self._maker(centred.inputs[1])
        if mean is None or not self._over_last(mean) or mean.inputs[0] != centred.inputs[0]:
            return False
        inside = {square.name, node.name}
        if set(self.readers[d]) != inside or not all(map(self._alone, (mean, square, spread, padded, root))):
            return False
        gain = self._reader(node, "Mul")
        gamma = "" if gain is None else self._other(gain, node.outputs[0])
        shift = self._reader(gain, "Add") if gain is not None and self._vector(gamma) else None
        beta = "" if shift is None or gain is None else self._other(shift, gain.outputs[0])
        if gain is None or shift is None or not self._vector(beta):
            return False
        parts = (mean, centred, square, spread, padded, root, node, gain, shift)
        inputs = (centred.inputs[0], gamma, beta)
        return self._join(
            parts, "LayerNormalization", inputs, {"axis": -1, "epsilon": epsilon}, node.name, ""
        )

    def attention(self, node: Node) -> bool:
        """``softmax(scale * q k' + mask) v``."""
        if node.op_type != "MatMul" or (chances := self._maker(node.inputs[0])) is None:
            return False
        parts, mask, scale = [node], "", 1.0
        if (guarded := self._guarded(chances)) is not None:
            parts = [*guarded[1:], node]
            chances = guarded[0]
        elif not self._alone(chances):
            return False
        if chances.op_type != "Softmax" or chances.get("axis", -1) not in (-1, 3):
            return False
        parts.insert(0, chances)
        at = self._maker(chances.inputs[0])
        if at is not None and at.op_type == "Add" and self._alone(at):
            sides = [(self._maker(name), name) for name in at.inputs]
            found = [
                (m, other) for (m, _), (_, other) in zip(sides, sides[::-1], strict=True) if self._scores(m)
            ]
            if not found:
                return False
            parts.insert(0, at)
            at, mask = found[0]
        while at is not None and (factor := self._factor(at)) is not None and self._alone(at):
            scale *= factor
            parts.insert(0, at)
            at = self._maker(self._operand(at))
        if at is None or at.op_type != "MatMul" or not self._alone(at) or at.constant:
            return False
        parts.insert(0, at)
        sides_read = []
        for name in at.inputs:
            maker = self._maker(name)
            if maker is not None and (factor := self._factor(maker)) is not None and self._alone(maker):
                scale *= factor
                parts.insert(0, maker)
                name = self._operand(maker)
            sides_read.append(name)
        inputs = (*sides_read, node.inputs[1], *([mask] if mask else []))
        return self._join(tuple(parts), ATTEND, inputs, {"scale": scale}, node.name)

    # what they ask

    def _guarded(self, node: Node) -> tuple[Node, Node, Node] | None:
        """A softmax whose NaN, of rows that are masked throughout, a Where replaces by 0."""
        if node.op_type != "Where" or not self._alone(node) or self._number(node.inputs[1]) != 0.0:
            return None
        check, softmax = self._maker(node.inputs[0]), self._maker(node.inputs[2])
        if (
            check is None
            or softmax is None
            or check.op_type != "IsNaN"
            or check.inputs != softmax.outputs[:1]
        ):
            return None
        inside = {check.name, node.name}
        return (softmax, check, node) if set(self.readers[softmax.outputs[0]]) == inside else None

    def _scores(self, node: Node | None) -> bool:
        """Whether a node makes products of activations, times numbers."""
        while node is not None and self._factor(node) is not None:
            node = self._maker(self._operand(node))
        return node is not None and node.op_type == "MatMul" and not node.constant

    def _maker(self, name: str) -> Node | None:
        return self.nodes.get(self.makers.get(name, ""))

    def _alone(self, node: Node) -> bool:
        """Whether one node alone reads what a node makes."""
        return node.outputs[0] not in self.outputs and len(self.readers.get(node.outputs[0], ())) == 1

    def _reader(self, node: Node, op_type: str) -> Node | None:
        """The one node that reads what another makes, if it is of that type."""
        if not self._alone(node):
            return None
        found = self.nodes.get(self.readers[node.outputs[0]][0])
        return found if found is not None and not found.domain and found.op_type == op_type else None

    @staticmethod
    def _other(node: Node, name: str) -> str:
        """The other operand."""
        return next((x for x in node.inputs if x != name), name)

    def _vector(self, name: str) -> bool:
        found = self.stored.get(name)
        return found is not None and found.ndim == 1 and found.size > 1 and found.dtype.kind == "f"

    def _row(self, name: str) -> bool:
        """Whether a stored tensor is a vector but for an axis of 1, and read once."""
        found = self.stored.get(name)
        row = found is not None and found.ndim == 2 and found.shape[0] == 1 and found.dtype.kind == "f"
        return row and len(self.readers[name]) == 1

    def _number(self, name: str) -> float | None:
        found = self.stored.get(name)
        return float(found.reshape(-1)[0]) if found is not None and found.size == 1 else None

    def _operand(self, node: Node) -> str:
        """What a node multiplies by a number."""
        return next(name for name in node.inputs if self._number(name) is None)

    def _factor(self, node: Node) -> float | None:
        """The number that a node multiplies by."""
        if (
            node.domain
            or node.op_type not in ("Mul", "Div")
            or all(self._number(n) is not None for n in node.inputs)
        ):
            return None
        if node.op_type == "Div":
            found = self._number(node.inputs[1])
            return 1.0 / found if found else None
        return next((v for name in node.inputs if (v := self._number(name)) is not None), None)

    def _over_last(self, node: Node) -> bool:
        """Whether it is a mean over the last axis."""
        given = self.stored.get(node.inputs[1]) if len(node.inputs) > 1 else node.get("axes")
        kept = node.op_type == "ReduceMean" and node.get("keepdims", 1)
        return bool(kept) and given is not None and list(np.asarray(given).reshape(-1)) == [-1]

    def _join(
        self,
        parts: tuple[Node, ...],
        op_type: str,
        inputs: tuple[str, ...],
        attributes: dict[str, object],
        name: str,
        domain: str = OWN_DOMAIN,
    ) -> bool:
        """Put one node in place of several, where the last one of them stood."""
        last = parts[-1]
        constant = frozenset(i for i, each in enumerate(inputs) if each in self.stored)
        joined = Node(name, op_type, domain, 21, attributes, inputs, last.outputs, constant, parts)
        gone = {part.name for part in parts} - {last.name}
        order = [(key, node) for key, node in self.nodes.items() if key not in gone]
        self.nodes = {
            (name if key == last.name else key): (joined if key == last.name else node) for key, node in order
        }
        for part in parts:
            for each in dict.fromkeys(part.inputs):
                if part.name in self.readers.get(each, ()):
                    self.readers[each].remove(part.name)
        for each in dict.fromkeys(inputs):
            self.readers.setdefault(each, []).append(name)
        self.makers[last.outputs[0]] = name
        return True
