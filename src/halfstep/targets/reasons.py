"""Why kinds of operators stay in float, where the targets say the same."""

from __future__ import annotations


def no_kernel(target: str, then: str) -> str:
    """The reason of a kind that the target's runtime has no integer kernel for, and what follows."""
    return f"has no integer kernel on {target} and runs in float; {then}"


def shared(target: str) -> dict[str, str]:
    """Return the reasons that hold for every target so far."""
    consequences = {
        "layer_norm": "the linear layers after it stay integer",
        "sub": "the layers around it stay integer",
        "div": "fold a constant divisor into the layer before, if it matters",
        "resize_linear": "nearest-neighbour resizing would be free",
        "mean": "a mean over all of the spatial axes would be an integer global pool",
        "adaptive_average_pool": "an output size of 1 would be an integer global pool",
    }
    return {
        **{kind: no_kernel(target, then) for kind, then in consequences.items()},
        "batch_norm": "does not follow a conv or linear directly, so it was not folded; it runs in float",
        **dict.fromkeys(
            ("topk", "sort", "argsort", "nms"), "orders values, and codes would make ties of them"
        ),
        "grid_sampler": no_kernel(target, "its grid holds places, for which 8 bits are too few"),
        "quantized": "is taken with the quantizers that the file had already",
        "embedding": "a table look-up: nothing is multiplied",
    }
