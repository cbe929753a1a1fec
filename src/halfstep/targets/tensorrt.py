"""TensorRT: signed codes with zero point 0, float biases, inputs of layers, the skip branch of residual adds.

It needs an NVIDIA GPU; here its files are executed as they are written, and held to TensorRT's rules.
"""

from halfstep.formats import Integer
from halfstep.targets.target import Kernel, Target

_FLOAT = "has no 8-bit kernel on tensorrt and runs in float; "
_FUSED = "is computed in float inside the layer before it; that layer stays integer"

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
    fused=frozenset({"hardswish", "hardsigmoid", "silu", "gelu", "sigmoid", "tanh", "leaky_relu"}),
    reasons={
        "hardswish": _FUSED,
        "hardsigmoid": _FUSED,
        "silu": _FUSED,
        "gelu": _FUSED,
        "sigmoid": _FUSED,
        "tanh": _FUSED,
        "leaky_relu": _FUSED,
        "concat": "is left in float: with a scale of its own on every branch it would be converted branch by branch",
        "mul": "is an element-wise product: left in float",
        "layer_norm": _FLOAT + "the linear layers after it stay integer",
        "softmax": _FLOAT + "the products around it are left in float with it",
        "attention": "is left to the runtime's fused attention kernels, which take 16-bit floats",
        "sub": _FLOAT + "the layers around it stay integer",
        "div": _FLOAT + "fold a constant divisor into the layer before, if it matters",
        "resize_linear": _FLOAT + "nearest-neighbour resizing would be free",
        "batch_norm": "does not follow a conv or linear directly, so it was not folded; it runs in float",
        "embedding": "a table look-up: nothing is multiplied",
        "mean": _FLOAT + "a mean over all of the spatial axes would be an integer global pool",
        "adaptive_average_pool": _FLOAT + "an output size of 1 would be an integer global pool",
    },
)
