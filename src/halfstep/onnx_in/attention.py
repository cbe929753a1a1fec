"""Attention: ONNX's own operator, and what products with a softmax between them are read as."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from halfstep.onnx_in.linear import OWN_DOMAIN
from halfstep.onnx_in.table import Node, operator, tensor

#: The operator that products with a softmax between them are read as; its keys are turned.
ATTEND = "Attend"


@operator(ATTEND, domain=OWN_DOMAIN)
def attended(node: Node, q: Tensor, k: Tensor, v: Tensor, mask: Any = None) -> Tensor:
    """Attention, its keys of (..., width, time)."""
    return F.scaled_dot_product_attention(q, k.transpose(-1, -2), v, tensor(mask), scale=node.get("scale"))


@operator("Attention")
def attention(
    node: Node,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any = None,
    past_k: Any = None,
    past_v: Any = None,
    lengths: Any = None,
) -> Any:
    """Scaled dot-product attention over heads, of three or four axes; keys may have fewer heads, and a past.

    Outputs that nobody wants are left out: the keys and values with their past, and the products (raw, capped, with the
    mask, or after the softmax).
    """
    flat = q.dim() == 3
    if flat:
        q = split_heads(q, node.get("q_num_heads"))
        k, v = (split_heads(x, node.get("kv_num_heads")) for x in (k, v))
    if past_k is not None:
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
    present = (k, v)
    if (groups := q.shape[1] // k.shape[1]) > 1:
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    bias = _bias(node, q, k, tensor(mask), past_k, tensor(lengths))
    if node.wanted(3) or node.get("softcap", 0.0):
        y, products = _in_full(node, q, k, v, bias)
    else:
        y, products = F.scaled_dot_product_attention(q, k, v, bias, scale=node.get("scale")), None
    y = y.transpose(1, 2).flatten(2) if flat else y
    return (y, *present, products) if any(map(node.wanted, (1, 2, 3))) else y


def _bias(
    node: Node, q: Tensor, k: Tensor, mask: Tensor | None, past: Any, lengths: Tensor | None
) -> Tensor | None:
    """What is added to the products: a mask, and less than anything where a key may not be seen."""
    count, keys = q.shape[2], k.shape[2]
    if mask is not None and mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    if mask is not None and mask.shape[-1] < keys:
        mask = F.pad(mask, [0, keys - mask.shape[-1]], value=-torch.inf)
    left, right = node.get("left_window_size", -1), node.get("right_window_size", -1)
    if node.get("is_causal", 0):
        right = 0 if right < 0 else min(right, 0)
    if left < 0 and right < 0 and lengths is None:
        return mask
    places, others = torch.arange(count)[:, None], torch.arange(keys)
    if past is not None:
        places = places + past.shape[2]
    elif lengths is not None:
        places = places + (lengths.reshape(-1, 1, 1, 1) - count)  # (batch, 1, queries, 1)
    hidden = torch.zeros_like(others, dtype=torch.bool) & (places < -1)
    if right >= 0:
        hidden = hidden | (others > places + right)
    if left >= 0:
        hidden = hidden | (others < places - left)
    if lengths is not None:
        hidden = hidden | (others >= lengths.reshape(-1, 1, 1, 1))
    own = torch.zeros_like(hidden, dtype=q.dtype).masked_fill(hidden, -torch.inf)
    return own if mask is None else own + mask


def _in_full(node: Node, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention with a soft cap, or whose products are wanted."""
    scale, cap = node.get("scale") or q.shape[-1] ** -0.5, node.get("softcap", 0.0)
    raw = torch.matmul(q, k.transpose(-1, -2)) * scale
    capped = torch.tanh(raw / cap) * cap if cap else raw
    masked = capped if bias is None else capped + bias
    chances = torch.softmax(masked, -1)
    if bias is not None:  # a query that sees nothing gets nothing
        blind = torch.isneginf(bias.amax(-1, keepdim=True))
        chances = torch.where(blind, torch.zeros_like(chances), chances)
    stages = (raw if not cap else capped, capped, masked, chances)
    return torch.matmul(chances, v), stages[node.get("qk_matmul_output_mode", 0)]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(batch, time, width) to (batch, heads, time, width / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    """Attention of (batch, heads, time, width) with a mask that is added; a causal one sees nothing behind."""
    if causal:
        hidden = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
        mask = torch.zeros_like(hidden, dtype=q.dtype).masked_fill(hidden, -torch.inf) + (
            0.0 if mask is None else mask
        )
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale or None)
