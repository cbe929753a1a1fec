"""Products of matrices, and attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from halfstep.onnx_in.table import Node, operator, tensor, unsupported

#: The operator that a product by a stored matrix and the bias behind it are read as; its weight is (outputs, inputs).
LINEAR = "Linear"
OWN_DOMAIN = "halfstep"
#: The operator that products with a softmax between them are read as; its keys are turned.
ATTEND = "Attend"


@operator("MatMul")
def matmul(_: Node, a: Any, b: Any) -> Tensor:
    """Product of the last two axes."""
    return torch.matmul(tensor(a), tensor(b))


@operator(LINEAR, domain=OWN_DOMAIN)
def linear(_: Node, x: Tensor, weight: Tensor, bias: Any = None) -> Tensor:
    """Product by a transposed weight, and a bias."""
    return F.linear(x, weight, tensor(bias))


@operator(ATTEND, domain=OWN_DOMAIN)
def attended(node: Node, q: Tensor, k: Tensor, v: Tensor, mask: Any = None) -> Tensor:
    """Attention, its keys of (..., width, time)."""
    return F.scaled_dot_product_attention(q, k.transpose(-1, -2), v, tensor(mask), scale=node.get("scale"))


@operator("Gemm")
def gemm(node: Node, a: Any, b: Any, c: Any = None) -> Tensor:
    """``alpha * A' B' + beta * C``."""
    a, b = tensor(a), tensor(b)
    a = a.t() if node.get("transA", 0) else a
    b = b.t() if node.get("transB", 0) else b
    y = torch.matmul(a, b)
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


@operator("Attention")
def attention(node: Node, q: Tensor, k: Tensor, v: Tensor, mask: Any = None, *past: Any) -> Tensor:
    """Scaled dot-product attention over heads, of three or four axes; keys may have fewer heads."""
    if any(x is not None for x in past) or any(map(node.wanted, (1, 2, 3))):
        raise unsupported("Attention with past or present keys")
    if node.get("softcap", 0.0) or node.get("qk_matmul_output_mode", 0):
        raise unsupported("Attention with a soft cap, or its products as an output,")
    flat = q.dim() == 3
    if flat:
        q = split_heads(q, node.get("q_num_heads"))
        k, v = (split_heads(x, node.get("kv_num_heads")) for x in (k, v))
    if (groups := q.shape[1] // k.shape[1]) > 1:
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    y = attend(q, k, v, tensor(mask), bool(node.get("is_causal", 0)), node.get("scale"))
    return y.transpose(1, 2).flatten(2) if flat else y


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(batch, time, width) to (batch, heads, time, width / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False, scale: float | None = None
) -> Tensor:
    """Attention of (batch, heads, time, width), with a mask that is added, or says what counts."""
    if causal:
        allowed = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        if mask is None:
            mask = allowed
        elif mask.dtype is torch.bool:
            mask = mask & allowed
        else:
            mask = mask.masked_fill(~allowed, -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale or None)
