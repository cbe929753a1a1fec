"""ONNX Runtime on CPU: integer kernels quantize what they write, so nearly every result gets a quantizer."""

from halfstep.formats import Integer
from halfstep.targets.target import Kernel, Lowering, Target

_FLOAT = "has no integer kernel on onnxruntime and runs in float; "

ONNXRUNTIME = Target(
    name="onnxruntime",
    activations=Integer(8, signed=False, symmetric=False),
    weights=Integer(8, signed=True, symmetric=True),
    layers={"conv": Kernel(output=True), "linear": Kernel(), "matmul": Kernel()},
    followers={
        "add": Kernel(output=True),
        "mul": Kernel(output=True),
        "concat": Kernel(output=True, partial=True),
        "sigmoid": Kernel(output=True),
        "hardsigmoid": Kernel(output=True),
        "leaky_relu": Kernel(output=True),
        "average_pool": Kernel(output=True),
        "global_average_pool": Kernel(output=True),
    },
    passes=frozenset(
        {"max_pool", "reshape", "transpose", "slice", "expand", "split", "item", "resize_nearest"}
    ),
    absorbed=frozenset({"relu", "clip"}),
    decomposed=frozenset({"silu", "hardswish"}),
    lowering=Lowering(integer_bias=True, full_rank_bias=True, guarded_floats=True, saturated_gates=True),
    run_time_ranges=frozenset({"linear", "matmul"}),  # ConvInteger runs at a twentieth of float's speed
    tables=frozenset({"embedding"}),
    simulated_bits=frozenset({16}),
    packed=True,
    reasons={
        "conv_transpose": _FLOAT + "its weight stays float",
        "gelu": _FLOAT + "the linear layers around it stay integer",
        "layer_norm": _FLOAT + "the linear layers after it stay integer",
        "softmax": "is left in float: 8-bit attention logits cost accuracy and save no time",
        "attention": "its two products are small and need run-time float softmax between them; left in float",
        "tanh": _FLOAT + "the layers around it stay integer",
        "sub": _FLOAT + "write a - b as a + (-b) with the sign in the layer before, if it matters",
        "div": _FLOAT + "fold a constant divisor into the layer before, if it matters",
        "resize_linear": _FLOAT + "nearest-neighbour resizing would be free",
        "batch_norm": "does not follow a conv or linear directly, so it was not folded; it runs in float",
        "embedding": "a table look-up: nothing is multiplied",
        "mean": _FLOAT + "a mean over all of the spatial axes would be an integer global pool",
        "adaptive_average_pool": _FLOAT + "an output size of 1 would be an integer global pool",
    },
)
