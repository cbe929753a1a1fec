"""What a portable recipe asks of formats, so that no sum of two products exceeds 16 bits.

On x86 processors without VNNI integer kernels add pairs of products so; see :mod:`halfstep.runtime.saturation`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import fx

from halfstep.formats import Format, Integer
from halfstep.granularity import PerGroup
from halfstep.graph.operators import Operator, is_depthwise
from halfstep.recipe import LayerSpec, TensorSpec
from halfstep.targets import Target


class PairSums:
    """Which formats a portable recipe leaves as they are.

    Args:
        target: whose kernels may add so.
        operators: of the graph.
        asked: what the recipe asks of each layer.
        moves: whether a node only moves codes about.
    """

    def __init__(
        self,
        target: Target,
        operators: Mapping[fx.Node, Operator],
        asked: Mapping[fx.Node, LayerSpec | None],
        moves: Callable[[fx.Node], bool],
    ) -> None:
        self.target, self.operators, self.asked, self.moves = target, operators, asked, moves

    def weight_format(self, weight: Format, node: fx.Node) -> Format:
        """A weight's format for a layer whose integer kernels may add pairs of products in 16 bits.

        By the recipe alone: a weight keeps its format, and what was learned for it, whatever layers go to float.
        Depthwise kernels add each product in 32 bits.
        """
        op = self.operators[node]
        if op.kind not in self.target.layers or is_depthwise(op):
            return weight
        specs = [spec for value in op.inputs for spec in self._asked_of(value)]
        integer = [spec for spec in specs if not isinstance(spec.granularity, PerGroup) and spec.bits <= 8]
        formats = (
            self.target.activation_format(spec, negative) for spec in integer for negative in (False, True)
        )
        return min(
            (self.target.portable_format(weight, each) for each in formats),
            key=lambda each: each.bits,
            default=weight,
        )

    def saturates(self, spec: TensorSpec) -> bool:
        """Whether products of two activations in this spec would not answer alike everywhere.

        In 7 bits one of them would be safe as a weight is; but ONNX has no 7 bits for what is computed, and a clip in
        front of each makes OpenVINO slower than float products (0.57 against 0.74 of a float encoder's speed on AVX2).
        """
        factor = self.target.activation_format(spec, negative=True)
        if not (isinstance(factor, Integer) and factor.signed):
            return False  # products of unsigned codes are added in 32 bits
        return self.target.portable_format(factor, self.target.activation_format(spec)) != factor

    def _asked_of(self, value: fx.Node) -> Iterator[TensorSpec]:
        """What the recipe asks of ``value`` for every layer that reads it, directly or moved."""
        for user in value.users:
            if user in self.asked:
                spec = self.asked[user]
                if spec is not None and spec.activations is not None:
                    yield spec.activations
            elif self.moves(user):
                yield from self._asked_of(user)
