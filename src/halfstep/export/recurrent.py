"""Plain recurrent layers as ONNX has them; torch translates LSTM and GRU so, and unrolls these to a fixed length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch


def _translate(
    activation: str,
    x: Any,
    states: Any,
    parameters: Sequence[Any],
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Any, Any]:
    """``aten.rnn_tanh`` or ``aten.rnn_relu`` in evaluation mode, for what onnxscript traces.

    Torch has the parameters of a direction in a row: of the input, of the state, and a bias for each.
    """
    from onnxscript import opset21

    op: Any = opset21

    directions, each = 2 if bidirectional else 1, 4 if has_biases else 2
    x = op.Transpose(x, perm=[1, 0, 2]) if batch_first else x
    last = []
    for layer in range(layers):
        start = layer * directions
        own = [parameters[i : i + each] for i in range(start * each, (start + directions) * each, each)]
        biases = [op.Concat(row[2], row[3], axis=0) for row in own if has_biases]
        outputs, state = op.RNN(
            x,
            _stacked(op, [row[0] for row in own]),
            _stacked(op, [row[1] for row in own]),
            _stacked(op, biases) if has_biases else None,
            None,
            op.Slice(states, [start], [start + directions], axes=[0]),
            activations=[activation] * directions,
            direction="bidirectional" if bidirectional else "forward",
            hidden_size=states.shape[2],
        )
        # (time, directions, batch, width) to (time, batch, directions * width)
        x = op.Reshape(op.Transpose(outputs, perm=[0, 2, 1, 3]), [0, 0, -1])
        last.append(state)
    return op.Transpose(x, perm=[1, 0, 2]) if batch_first else x, op.Concat(*last, axis=0)


def _stacked(op: Any, rows: Sequence[Any]) -> Any:
    """One for each direction, along a first axis."""
    return op.Concat(*(op.Unsqueeze(row, [0]) for row in rows), axis=0)


RNN: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.rnn_tanh.input: partial(_translate, "Tanh"),
    torch.ops.aten.rnn_relu.input: partial(_translate, "Relu"),
}
