"""OpenVINO on CPU: kernels write what the next one reads, so only inputs of layers get quantizers."""

from halfstep.formats import Integer
from halfstep.targets.target import Kernel, Lowering, Target, shared

_FUSED = frozenset({"hardswish", "hardsigmoid", "silu", "gelu", "sigmoid", "tanh", "leaky_relu"})
_IN_THE_LAYER = "is computed in float inside the layer before it, at no cost; that layer stays integer"

OPENVINO = Target(
    name="openvino",
    runtime="openvino",
    activations=Integer(8, signed=False, symmetric=False),
    # A zero point other than 0 is subtracted before every product, in a pass of its own.
    signed=Integer(8, signed=True, symmetric=True, narrow=False),
    weights=Integer(8, signed=True, symmetric=True),
    layers={"conv": Kernel(), "conv_transpose": Kernel(), "linear": Kernel(), "matmul": Kernel()},
    followers={
        "add": Kernel(joins=True),
        # Signed codes are shifted to unsigned ones before a conv, and lose the shift on their way through a concat.
        "concat": Kernel(partial=True, affine=True),
        # Its first product, of queries and keys. Codes for the softmax and the values cost more than they save.
        "attention": Kernel(reads=2),
        "average_pool": Kernel(),
        "global_average_pool": Kernel(),
    },
    passes=frozenset(
        {"max_pool", "reshape", "transpose", "slice", "expand", "split", "item", "resize_nearest"}
    ),
    absorbed=frozenset({"relu", "clip"}),
    # Where what reads them is quantized, its answers are 17 to 25 dB away from what the file says.
    misread=frozenset({"amax", "amin", "max", "min", *(f"adaptive_max_pool{axes}d" for axes in (1, 2, 3))}),
    # Quantizers of 16 bits are taken out when a file is loaded, and with them the clip or ReLU that they stand for.
    widest=15,
    fused=_FUSED,
    pair_sums=True,
    lowering=Lowering(added_bias=True, turned_floats=True),
    reasons={
        **shared("openvino"),
        **dict.fromkeys(_FUSED, _IN_THE_LAYER),
        "mul": "is an element-wise product: left in float, where it costs what it would in integers",
        "softmax": "is left in float: 8-bit attention logits cost accuracy and save no time",
        "attention": "is left in float where it has a mask, is one operator of the file, or the recipe is portable",
    },
)
