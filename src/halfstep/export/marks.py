"""Markers on the edges of a network while it is translated: where quantizers will be, in one placement or several.

A translation takes seconds, so one serves every placement that is foreseen. Readers of a value that no placement parts
share a marker; settled, the markers of a quantizer are put together and those that nothing needs are taken out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import fx

from halfstep.graph.placement import Inserted, Layer, Placement, Position, Site

DOMAIN = "halfstep"
MARKER = "Site"

#: Where torch's exporter writes the modules that a node was made in, outermost first.
SCOPES = "pkg.torch.onnx.name_scopes"


@torch.library.custom_op("halfstep::site", mutates_args=())
def _site(x: torch.Tensor, name: str) -> torch.Tensor:
    return x.clone()


@_site.register_fake
def _(x: torch.Tensor, name: str) -> torch.Tensor:
    return torch.empty_like(x)


@cache
def marker_translation() -> Any:
    """The marker as an onnxscript operator; its schema is registered once a process, in our own domain."""
    from onnxscript import values

    schema = onnx.defs.OpSchema
    onnx.defs.register_schema(
        schema(
            MARKER,
            DOMAIN,
            1,
            inputs=[schema.FormalParameter("x", "T")],
            outputs=[schema.FormalParameter("y", "T")],
            type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(double)"], "any float")],
            attributes=[
                schema.Attribute("name", onnx.defs.OpSchema.AttrType.STRING, "the site", required=True)
            ],
        )
    )
    domain = values.Opset(DOMAIN, 1)

    def translate(x: Any, name: str) -> Any:
        return domain.Site(x, name=name)

    return translate


def markers(graph: ir.Graph) -> list[ir.Node]:
    """Every marker, in order."""
    return [node for node in graph if is_marker(node)]


def is_marker(node: ir.Node | None) -> bool:
    """Whether a node stands for a site."""
    return node is not None and node.domain == DOMAIN and node.op_type == MARKER


def marker_name(node: ir.Node) -> str:
    """The site that a marker stands for."""
    return node.attributes.get_string("name")


def bias_marker(layer: str) -> str:
    """What the marker on a layer's bias is called; no site's name ends so."""
    return f"{layer}:bias"


@dataclass(frozen=True)
class Marks:
    """The edges that carry a marker, each called after its index, and the layers whose biases do.

    Attributes:
        edges: values with the readers that see the marker instead; none reads a value through two.
        biases: names of layers.
    """

    edges: tuple[Position, ...]
    biases: frozenset[str]

    @classmethod
    def of(cls, placements: Iterable[Placement], biases: Iterable[str]) -> Marks:
        """The fewest edges that each of ``placements`` can be put together from."""
        seen: dict[tuple[fx.Node, fx.Node], list[int]] = {}
        positions = (p for placement in placements for site in placement.sites for p in site.positions)
        for number, position in enumerate(positions):
            for reader in dict.fromkeys(position.readers):
                seen.setdefault((position.value, reader), []).append(number)
        alike: dict[tuple[fx.Node, tuple[int, ...]], list[fx.Node]] = {}
        for (value, reader), numbers in seen.items():
            alike.setdefault((value, tuple(numbers)), []).append(reader)
        edges = tuple(Position(value, tuple(readers)) for (value, _), readers in alike.items())
        return cls(edges, frozenset(biases))

    @cached_property
    def _index(self) -> dict[tuple[fx.Node, fx.Node], int]:
        return {(edge.value, reader): i for i, edge in enumerate(self.edges) for reader in edge.readers}

    def parts(self, position: Position) -> list[int] | None:
        """The edges that make up a position; None if there are no such ones."""
        found = {self._index.get((position.value, reader), -1): None for reader in position.readers}
        if -1 in found or {r for i in found for r in self.edges[i].readers} != set(position.readers):
            return None
        return list(found)

    def cover(self, placement: Placement, biases: Collection[str]) -> bool:
        """Whether what has these marks can be settled for ``placement``, and has the biases of these layers marked."""
        positions = (position for site in placement.sites for position in site.positions)
        return self.biases.issuperset(biases) and all(self.parts(p) is not None for p in positions)

    def insert(self, copy: Inserted, layers: Iterable[Layer]) -> None:
        """Put the markers into a copy of the graph whose nodes the edges are of.

        Args:
            copy: what they are put into.
            layers: those of the network.
        """
        graph, copies = copy.graph, copy.copies
        for index, edge in enumerate(self.edges):
            value = copies[edge.value]
            with graph.inserting_after(value):
                marker = _marked(graph, value, str(index))
            for reader in edge.readers:
                copies[reader].replace_input_with(value, marker)
        for layer in layers:
            if layer.name in self.biases:
                node = copies[layer.operator.node]
                bias = node.args[2]
                assert isinstance(bias, fx.Node)
                with graph.inserting_before(node):
                    node.update_arg(2, _marked(graph, bias, bias_marker(layer.name)))

    def settle(self, graph: ir.Graph, sites: Iterable[Site], biases: Mapping[str, ir.Value | None]) -> bool:
        """Leave the markers of a placement's sites in a translated graph, called after them.

        Args:
            graph: the translation.
            sites: of a placement that these marks cover; none for the float network.
            biases: the layers whose biases keep their markers, or have a value instead of them.

        Returns:
            Whether operators met that a marker stood between; what can be folded or fused was not tried there.
        """
        waiting = {marker_name(node): node for node in graph.all_nodes() if is_marker(node)}
        for site in sites:
            for position in site.positions:
                found = [waiting.pop(str(i)) for i in self.parts(position) or () if str(i) in waiting]
                for other in found[1:]:  # all of them stand right behind the value
                    _take_out(other, found[0].outputs[0])
                for node in found[:1]:
                    node.attributes["name"] = ir.AttrString("name", site.name)
                    node.metadata_props[SCOPES] = repr([site.name])
        for layer, value in biases.items():
            marker = waiting.pop(bias_marker(layer), None)
            if marker is not None and value is not None:
                _take_out(marker, value)
        for node in waiting.values():
            _take_out(node, node.inputs[0])
        return bool(waiting)


def _marked(graph: fx.Graph, value: fx.Node, name: str) -> fx.Node:
    node = graph.call_function(torch.ops.halfstep.site.default, (value, name))
    node.meta = {**value.meta, "nn_module_stack": {"": (name, "halfstep.Site")}}
    return node


def _take_out(marker: ir.Node, value: ir.Value | None) -> None:
    """Let what reads a marker read ``value``."""
    assert value is not None and marker.graph is not None
    ir.convenience.replace_all_uses_with(marker.outputs[0], value, replace_graph_outputs=True)
    marker.graph.remove(marker, safe=True)
