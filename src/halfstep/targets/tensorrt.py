"""TensorRT: signed codes with zero point 0, float biases, inputs of layers, the skip branch of residual adds.

It needs an NVIDIA GPU; here its files are executed as they are written, and held to TensorRT's rules.
"""

from halfstep.formats import Integer
from halfstep.targets.target import Kernel, Target, no_kernel, shared

_FUSED = frozenset({"hardswish", "hardsigmoid", "silu", "gelu", "sigmoid", "tanh", "leaky_relu"})
_IN_THE_LAYER = "is computed in float inside the layer before it; that layer stays integer"

TENSORRT = Target(
    name="tensorrt",
    runtime="reference",
    activations=Integer(8, signed=True, symmetric=True, narrow=False),
    weights=Integer(8, signed=True, symmetric=True),
    layers={"conv": Kernel(), "conv_transpose": Kernel(), "linear": Kernel(), "matmul": Kernel()},
    followers={
        "add": Kernel(joins=True),
        "average_pool": Kernel(),
        "global_average_pool": Kernel(),
    },
    passes=frozenset(
        {"max_pool", "reshape", "transpose", "slice", "expand", "split", "item", "resize_nearest"}
    ),
    # With zero point 0 no code stands for the low end of a ReLU: it stays, and the conv before it takes it in.
    absorbed=frozenset({"relu", "clip"}),
    fused=_FUSED,
    reasons={
        **shared("tensorrt"),
        **dict.fromkeys(_FUSED, _IN_THE_LAYER),
        "concat": "is left in float: with a scale of its own on every branch it would be converted branch by branch",
        "mul": "is an element-wise product: left in float",
        "softmax": no_kernel("tensorrt", "the products around it are left in float with it"),
        "attention": "is left to the runtime's fused attention kernels, which take 16-bit floats",
    },
)
