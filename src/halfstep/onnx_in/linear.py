"""Products of matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from halfstep.onnx_in.table import Node, operator, tensor

#: The operator that a product by a stored matrix and the bias behind it are read as; its weight is (outputs, inputs).
LINEAR = "Linear"
OWN_DOMAIN = "halfstep"


@operator("MatMul")
def matmul(_: Node, a: Any, b: Any) -> Tensor:
    """Product of the last two axes."""
    return torch.matmul(tensor(a), tensor(b))


@operator(LINEAR, domain=OWN_DOMAIN)
def linear(_: Node, x: Tensor, weight: Tensor, bias: Any = None) -> Tensor:
    """Product by a transposed weight, and a bias."""
    return F.linear(x, weight, tensor(bias))


@operator("Gemm")
def gemm(node: Node, a: Any, b: Any, c: Any = None) -> Tensor:
    """``alpha * A' B' + beta * C``; those that are plain layers are read as :data:`LINEAR`."""
    left, right = "ki" if node.get("transA", 0) else "ik", "jk" if node.get("transB", 0) else "kj"
    y = torch.einsum(f"{left},{right}->ij", tensor(a), tensor(b))
    if (alpha := node.get("alpha", 1.0)) != 1.0:
        y = alpha * y
    if c is None:
        return y
    beta = node.get("beta", 1.0)
    return y + (tensor(c) if beta == 1.0 else beta * tensor(c))


@operator("Einsum")
def einsum(node: Node, *xs: Any) -> Tensor:
    """Sums of products, by their letters."""
    return torch.einsum(node.get("equation"), *map(tensor, xs))
