"""The fused operators that ONNX Runtime's optimizer writes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from halfstep.onnx_in import convolution, linear
from halfstep.onnx_in.attention import attend, split_heads
from halfstep.onnx_in.normalisation import layer_norm, rms_norm
from halfstep.onnx_in.table import MICROSOFT, TABLE, Node, operator, tensor, unsupported


@operator("Gelu", domain=MICROSOFT)
def gelu(_: Node, x: Tensor) -> Tensor:
    """Exact."""
    return F.gelu(x)


@operator("FastGelu", domain=MICROSOFT)
def fast_gelu(_: Node, x: Tensor, bias: Any = None) -> Tensor:
    """By tanh, of a sum."""
    return F.gelu(x if bias is None else x + tensor(bias), approximate="tanh")


@operator("BiasGelu", domain=MICROSOFT)
def bias_gelu(_: Node, x: Tensor, bias: Any) -> Tensor:
    """Exact, of a sum."""
    return F.gelu(x + tensor(bias))


@operator("QuickGelu", domain=MICROSOFT)
def quick_gelu(node: Node, x: Tensor) -> Tensor:
    """``x * sigmoid(alpha * x)``."""
    alpha = node.get("alpha", 1.702)
    return F.silu(x) if alpha == 1.0 else x * torch.sigmoid(alpha * x)


@operator("FusedMatMul", domain=MICROSOFT)
def fused_matmul(node: Node, a: Any, b: Any) -> Tensor:
    """A product of transposed operands, times a number."""
    a, b = tensor(a), tensor(b)
    if node.get("transBatchA", 0) or node.get("transBatchB", 0):
        raise unsupported("FusedMatMul with transposed batches")
    a = a.transpose(-1, -2) if node.get("transA", 0) else a
    b = b.transpose(-1, -2) if node.get("transB", 0) else b
    # A layer's weight is a whole tensor as it lies there.
    turned = 1 in node.constant and node.get("transB", 0)
    alpha, y = node.get("alpha", 1.0), torch.einsum("...k,kj->...j", a, b) if turned else torch.matmul(a, b)
    return y if alpha == 1.0 else alpha * y


def _activate(node: Node, y: Tensor) -> Tensor:
    """The activation that a fused operator ends with."""
    name, parameters = node.get("activation", ""), list(node.get("activation_params", ()))
    if name == "Clip":
        return F.relu6(y) if parameters == [0.0, 6.0] else torch.clamp(y, *parameters)
    known = {"Relu": (), "Sigmoid": (), "Tanh": (), "LeakyRelu": ("alpha",), "HardSigmoid": ("alpha", "beta")}
    if not name:
        return y
    if name not in known:
        raise unsupported(f"{node.op_type} with the activation {name!r}")
    alpha = node.get("activation_alpha")
    given = parameters or [value for value in (alpha, node.get("activation_beta")) if value is not None]
    attributes = dict(zip(known[name], given, strict=False))
    own = Node(node.name, name, "", 21, attributes, (), ())
    result: Tensor = TABLE["", name](own, y)
    return result


@operator("FusedConv", domain=MICROSOFT)
def fused_conv(node: Node, x: Tensor, weight: Any, bias: Any = None, added: Any = None) -> Tensor:
    """A conv, what is added to it, and an activation."""
    y = convolution.conv(node, x, weight, bias)
    return _activate(node, y if added is None else y + added)


@operator("FusedGemm", domain=MICROSOFT)
def fused_gemm(node: Node, a: Any, b: Any, c: Any = None) -> Tensor:
    """A Gemm and an activation."""
    return _activate(node, linear.gemm(node, a, b, c))


@operator("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", domain=MICROSOFT)
def skip_norm(node: Node, x: Tensor, skip: Tensor, gamma: Any, *rest: Any) -> tuple[Any, ...]:
    """The norm of a sum, and the sum as its fourth output."""
    simple = node.op_type == "SkipSimplifiedLayerNormalization"
    beta, bias = ((None, *rest) if simple else (*rest, None, None))[:2] if rest else (None, None)
    total = x + tensor(skip)
    total = total if bias is None else total + tensor(bias)
    own = Node(node.name, "", "", 17, {"epsilon": node.get("epsilon", 1e-12)}, (), ())
    y = rms_norm(own, total, gamma) if simple else layer_norm(own, total, gamma, beta)
    return y, None, None, total


@operator("EmbedLayerNormalization", domain=MICROSOFT)
def embed_norm(
    node: Node, words: Tensor, kinds: Any, table: Tensor, places: Tensor, *rest: Any
) -> tuple[Any, ...]:
    """The norm of the sum of three embeddings."""
    segments, gamma, beta, mask, positions = (*rest, None, None, None)[:5]
    if mask is not None or node.get("mask_index_type", 0):
        raise unsupported("EmbedLayerNormalization that counts its mask")
    total = F.embedding(words, table)
    total = total + (places[: words.shape[1]][None] if positions is None else F.embedding(positions, places))
    if segments is not None:
        total = total + F.embedding(kinds, segments)
    own = Node(node.name, "", "", 17, {"epsilon": node.get("epsilon", 1e-12)}, (), ())
    return layer_norm(own, total, gamma, beta), torch.zeros(words.shape[0], dtype=torch.int32), total


@operator("MultiHeadAttention", domain=MICROSOFT)
def multi_head(node: Node, q: Tensor, k: Any = None, v: Any = None, bias: Any = None, *rest: Any) -> Tensor:
    """Attention over heads of queries, keys and values of (batch, time, width)."""
    padding, added, *past = (*rest, None, None)[: max(2, len(rest))]
    if k is None or k.dim() != 3 or any(x is not None for x in past) or node.wanted(1):
        raise unsupported("MultiHeadAttention with packed or past keys")
    heads = node.get("num_heads")
    if bias is not None:
        parts = tensor(bias).split([q.shape[-1], k.shape[-1], v.shape[-1]])
        q, k, v = (x + part for x, part in zip((q, k, v), parts, strict=True))
    mask = _mask(padding, added)
    q, k, v = (split_heads(x, heads) for x in (q, k, v))
    y = attend(q, k, v, mask, bool(node.get("unidirectional", 0)), node.get("scale"))
    return y.transpose(1, 2).flatten(2)


@operator("Attention", domain=MICROSOFT)
def attention(node: Node, x: Tensor, weight: Any, bias: Any = None, mask: Any = None, *rest: Any) -> Tensor:
    """Attention with the projection to queries, keys and values in it."""
    past, added, *more = (*rest, None, None)[: max(2, len(rest))]
    if past is not None or any(each is not None for each in more) or node.wanted(1):
        raise unsupported("Attention with past keys")
    y = torch.matmul(x, tensor(weight))
    y = y if bias is None else y + tensor(bias)
    sizes = node.get("qkv_hidden_sizes") or [y.shape[-1] // 3] * 3
    q, k, v = (split_heads(part, node.get("num_heads")) for part in y.split(list(sizes), -1))
    y = attend(q, k, v, _mask(mask, added), bool(node.get("unidirectional", 0)), node.get("scale"))
    return y.transpose(1, 2).flatten(2)


def _mask(padding: Any, added: Any) -> Tensor | None:
    """What is added to the products: a given bias, and where padding is 0 so little that nothing is left."""
    mask = None if added is None else tensor(added)
    if padding is not None:
        padding = tensor(padding)
        if padding.dim() not in (2, 3):
            raise unsupported(f"an attention mask of {padding.dim()} axes")
        shape = (slice(None), None, None) if padding.dim() == 2 else (slice(None), None)
        low = torch.where(padding[shape] == 0, torch.finfo(torch.float32).min, 0.0)
        mask = low if mask is None else mask + low
    return mask


@operator("RotaryEmbedding", domain=MICROSOFT)
def rotary(node: Node, x: Tensor, positions: Any, cosines: Any, sines: Any) -> Tensor:
    """Pairs turned by angles that grow with the place."""
    cosines, sines = tensor(cosines), tensor(sines)
    width, flat = 2 * int(cosines.shape[-1]), x.dim() == 3
    if node.get("rotary_embedding_dim", 0) or node.get("is_packed_batching", 0):
        raise unsupported("RotaryEmbedding of a part of the width")
    heads = x.unflatten(-1, (-1, width)).transpose(1, 2) if flat else x  # (batch, heads, time, width)
    places = tensor(positions).long()
    if places.dim() == 1 or places.shape[-1] == 1:
        places = places.reshape(-1, 1) + torch.arange(heads.shape[2])
    c, s = cosines[places][:, None], sines[places][:, None]
    if node.get("interleaved", 0):
        a, b = heads[..., ::2], heads[..., 1::2]
        y = torch.stack([a * c - b * s, a * s + b * c], -1).flatten(-2)
    else:
        a, b = heads.chunk(2, -1)
        y = torch.cat([a * c - b * s, a * s + b * c], -1)
    return y.transpose(1, 2).flatten(2) if flat else y
