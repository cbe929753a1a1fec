"""ONNX Runtime on CPU: integer kernels quantize what they write, so nearly every result gets a quantizer."""

from halfstep.formats import Integer
from halfstep.targets.target import Kernel, Lowering, Target, no_kernel, shared

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
    lowering=Lowering(
        integer_bias=True,
        weight_bits=7,  # not 8: sums of pairs would saturate
        full_rank_bias=True,
        guarded_floats=True,
        saturated_gates=True,
        detached_clips=True,
    ),
    run_time_ranges=frozenset({"linear", "matmul"}),  # ConvInteger runs at a twentieth of float's speed
    tables=frozenset({"embedding"}),
    simulated_bits=frozenset({16}),
    packed=True,
    pair_sums=True,
    reasons={
        **shared("onnxruntime"),
        "conv_transpose": no_kernel("onnxruntime", "its weight stays float"),
        "gelu": no_kernel("onnxruntime", "the linear layers around it stay integer"),
        "softmax": "is left in float: 8-bit attention logits cost accuracy and save no time",
        "attention": "its two products are small and need run-time float softmax between them; left in float",
        "tanh": no_kernel("onnxruntime", "the layers around it stay integer"),
        "sub": no_kernel(
            "onnxruntime", "write a - b as a + (-b) with the sign in the layer before, if it matters"
        ),
    },
)
