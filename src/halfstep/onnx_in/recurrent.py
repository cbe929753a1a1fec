"""Recurrent layers: LSTM, GRU, RNN, with torch's operators where these compute the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from halfstep.onnx_in.table import Node, operator, tensor, unsupported

#: Where torch's gates are among ONNX's: input, forget, cell, output of (i, o, f, c); reset, update, new of (z, r, h).
_GATES = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}
_ACTIVATIONS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}


@operator("LSTM")
def lstm(
    node: Node,
    x: Any,
    w: Any,
    r: Any,
    b: Any = None,
    lengths: Any = None,
    h: Any = None,
    c: Any = None,
    p: Any = None,
) -> tuple[Tensor, ...]:
    """Outputs of all steps, and the last state and cell."""
    if p is not None:
        raise unsupported("LSTM with peepholes")
    return _run(node, x, w, r, b, lengths, h, c)


@operator("GRU", "RNN")
def gru(
    node: Node, x: Any, w: Any, r: Any, b: Any = None, lengths: Any = None, h: Any = None
) -> tuple[Tensor, ...]:
    """Outputs of all steps, and the last state."""
    return _run(node, x, w, r, b, lengths, h, None)


def _run(node: Node, x: Any, w: Any, r: Any, b: Any, lengths: Any, h: Any, c: Any) -> tuple[Tensor, ...]:
    kind, direction = node.op_type, node.get("direction", "forward")
    _check(node, lengths)
    x, w, r, b, h, c = map(tensor, (x, w, r, b, h, c))
    if node.get("layout", 0):
        x, h, c = (None if v is None else v.transpose(0, 1) for v in (x, h, c))
    outputs, states, cells = [], [], []
    for index in range(w.shape[0]):
        backwards = direction == "reverse" or index == 1
        own = _weights(kind, w[index], r[index], None if b is None else b[index])
        zero = x.new_zeros(1, x.shape[1], r.shape[-1])
        start = zero if h is None else h[index : index + 1]
        source = x.flip(0) if backwards else x
        if kind == "LSTM":
            first = (start, zero if c is None else c[index : index + 1])
            y, state, cell = torch.lstm(source, first, own, True, 1, 0.0, False, False, False)
            cells.append(cell)
        elif kind == "GRU" and not node.get("linear_before_reset", 0):
            y, state = _reset_first(source, start, own)
        else:
            functions: dict[str, Callable[..., Any]] = {
                "GRU": torch.gru,
                "Tanh": torch.rnn_tanh,
                "Relu": torch.rnn_relu,
            }
            name = kind if kind == "GRU" else (node.get("activations") or ["Tanh", "Tanh"])[index]
            y, state = functions[name](source, start, own, True, 1, 0.0, False, False, False)
        outputs.append(y.flip(0) if backwards else y)
        states.append(state)
    y = torch.stack(outputs, 1)  # (time, directions, batch, width)
    results = [torch.cat(part, 0) for part in (states, cells) if part]
    if node.get("layout", 0):
        return (y.permute(2, 0, 1, 3), *(part.transpose(0, 1) for part in results))
    return (y, *results)


def _check(node: Node, lengths: Any) -> None:
    kind = node.op_type
    if lengths is not None:
        raise unsupported(f"{kind} with a length for each sequence")
    if node.get("clip") or node.get("input_forget", 0):
        raise unsupported(f"{kind} with clipped or coupled gates")
    wanted, given = _ACTIVATIONS[kind], node.get("activations")
    count = len(wanted)
    for at in range(0, len(given or ()), count):
        part = list(given[at : at + count])
        if part != wanted and not (kind == "RNN" and part == ["Relu"]):
            raise unsupported(f"{kind} with the activations {part}")


def _weights(kind: str, w: Tensor, r: Tensor, b: Tensor | None) -> list[Tensor]:
    """Weights and biases in torch's order of gates."""
    order = _GATES[kind]

    def ordered(x: Tensor) -> Tensor:
        parts = x.chunk(len(order), 0)
        return torch.cat([parts[i] for i in order], 0)

    biases = w.new_zeros(2 * w.shape[0]) if b is None else b
    return [*map(ordered, (w, r)), *map(ordered, biases.chunk(2, 0))]


def _reset_first(x: Tensor, h: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    """A GRU that resets the state before its product, step by step: torch has the other one only."""
    w, r, wb, rb = weights
    given = _product(x, w) + wb
    width, state, outputs = r.shape[1], h[0], []
    gates, new = r.split([2 * width, width], 0)
    gates_bias, new_bias = rb.split([2 * width, width], 0)
    for step in range(int(x.shape[0])):
        own, own_new = given[step].split([2 * width, width], -1)
        reset, update = torch.sigmoid(own + _product(state, gates) + gates_bias).chunk(2, -1)
        fresh = torch.tanh(own_new + _product(reset * state, new) + new_bias)
        state = (1 - update) * fresh + update * state
        outputs.append(state)
    return torch.stack(outputs), state[None]


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """By a part of the file's weight: as a sum, since a layer's weight is a whole tensor."""
    return torch.einsum("...i,oi->...o", x, weight)
