"""A quantized layer's weight, as the rows that its outputs are made of."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from halfstep.fake_quantize import FakeQuantize
from halfstep.formats import Codebook
from halfstep.graph.operators import Operator
from halfstep.graph.placement import Layer
from halfstep.model import QuantizedModel
from halfstep.repair.moments import as_rows, from_rows, has_rows


@dataclass(frozen=True)
class LayerWeight:
    """The float weight of a layer with the site that quantizes it.

    Attributes:
        op: the layer's operator.
        site: the weight's quantizer.
        tensor: the float weight.
    """

    op: Operator
    site: FakeQuantize
    tensor: Tensor

    @classmethod
    def of(cls, model: QuantizedModel, layer: Layer) -> LayerWeight:
        """The weight of a layer that is not :func:`unfit`."""
        assert layer.operator.weight is not None
        name = str(layer.operator.weight.target)
        return cls(layer.operator, model.sites[name], model.weight(name).detach())

    def rows(self) -> Tensor:
        """The float weight, (groups, out, inputs)."""
        return as_rows(self.op, self.tensor)

    def rounded_rows(self) -> Tensor:
        """The quantized weight, (groups, out, inputs)."""
        return as_rows(self.op, self.site.rounded(self.tensor))

    def tensor_of(self, rows: Tensor) -> Tensor:
        """Rows put back to the weight's own shape."""
        return from_rows(self.op, rows, self.tensor.shape)

    def round_to(self, rows: Tensor) -> None:
        """Let the weight round to these rows, numbers of its format at its range."""
        self.site.round_to(self.tensor, self.tensor_of(rows).to(self.tensor.dtype))


def unfit(model: QuantizedModel, layer: Layer) -> str:
    """Why passes that work on a layer's rows leave it alone; empty if they do not."""
    weight = layer.operator.weight
    if weight is None or str(weight.target) not in model.sites:
        return "its weight is not quantized"
    if not has_rows(layer.operator):
        return f"a {layer.operator.kind} is no sum over rows of its weight"
    site = next(site for site in model.placement.sites if site.name == str(weight.target))
    if sum(len(position.readers) for position in site.positions) > 1:
        return "its weight is shared with another layer"
    if isinstance(site.format, Codebook) and site.format.values.dim() > 1:
        return "its codebook has a table for every row"
    return ""
