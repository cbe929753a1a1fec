"""Choices: the layers that are not quantized as the recipe says, on request."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from halfstep.recipe import LayerSpec, Recipe


@dataclass(frozen=True)
class Choices:
    """Layers at a step between the recipe and float; one that is named more than once is at the first below.

    Attributes:
        float_layers: left in float.
        int16_layers: whose activations are read in 16 bits.
        dynamic_layers: whose activations get their range at run time.
    """

    float_layers: frozenset[str] = frozenset()
    int16_layers: frozenset[str] = frozenset()
    dynamic_layers: frozenset[str] = frozenset()

    def spec(self, recipe: Recipe, layer: str, end: bool) -> LayerSpec | None:
        """The spec of a layer that is not left in float here; None if it stays so by the recipe.

        Args:
            recipe: what it would be otherwise.
            layer: its name.
            end: whether it is one of the network's first or last layers.
        """
        spec = recipe.spec(layer, end)
        if spec is not None and layer in self.int16_layers:
            return spec.with_int16_activations()
        if spec is not None and layer in self.dynamic_layers:
            return spec.with_dynamic_activations()
        return spec

    def to_dict(self) -> dict[str, list[str]]:
        """The names, sorted, by the field that they are in."""
        return {name: sorted(layers) for name, layers in asdict(self).items()}
