"""OpenVINO on CPU: kernels write what the next one reads, so only inputs of layers get quantizers."""

from halfstep.formats import Integer
from halfstep.targets.target import Kernel, Target

_FLOAT = "has no integer kernel on openvino and runs in float; "
_FUSED = "is computed in float inside the layer before it, at no cost; that layer stays integer"

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
        "concat": Kernel(partial=True),
        "average_pool": Kernel(),
        "global_average_pool": Kernel(),
    },
    passes=frozenset(
        {"max_pool", "reshape", "transpose", "slice", "expand", "split", "item", "resize_nearest"}
    ),
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
        "mul": "is an element-wise product: left in float, where it costs what it would in integers",
        "layer_norm": _FLOAT + "the linear layers after it stay integer",
        "softmax": "is left in float: 8-bit attention logits cost accuracy and save no time",
        "attention": "its two products are small and need run-time float softmax between them; left in float",
        "sub": _FLOAT + "the layers around it stay integer",
        "div": _FLOAT + "fold a constant divisor into the layer before, if it matters",
        "resize_linear": _FLOAT + "nearest-neighbour resizing would be free",
        "batch_norm": "does not follow a conv or linear directly, so it was not folded; it runs in float",
        "embedding": "a table look-up: nothing is multiplied",
        "mean": _FLOAT + "a mean over all of the spatial axes would be an integer global pool",
        "adaptive_average_pool": _FLOAT + "an output size of 1 would be an integer global pool",
    },
)
