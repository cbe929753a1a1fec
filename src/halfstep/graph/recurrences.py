"""Recurrent layers are one operator while a network is traced, whatever the length of what they read.

To see which shape they answer, torch runs their decomposition, a loop over the time steps: that takes as long as the
sequence, and fixes its length. The shapes follow from the arguments alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._decomp import decomposition_table

_OPERATORS = tuple(getattr(torch.ops.aten, name).input for name in ("lstm", "gru", "rnn_tanh", "rnn_relu"))
_KEYS = (torch._C.DispatchKey.Autograd, torch._C.DispatchKey.CompositeImplicitAutograd)


@contextmanager
def recurrences_whole() -> Iterator[None]:
    """Let LSTM, GRU and RNN answer with their shapes in this block, which nothing may compute in."""
    kernels = [dict(op.py_kernels) for op in _OPERATORS]
    decompositions = {op: decomposition_table.get(op) for op in _OPERATORS}
    try:
        for op in _OPERATORS:
            op.py_kernels.update(dict.fromkeys(_KEYS, _shapes))
            decomposition_table[op] = _shapes
            op._dispatch_cache.clear()
        yield
    finally:
        for op, before in zip(_OPERATORS, kernels, strict=True):
            op.py_kernels.clear()
            op.py_kernels.update(before)
            op._dispatch_cache.clear()
            if (own := decompositions[op]) is None:
                decomposition_table.pop(op, None)
            else:
                decomposition_table[op] = own


def _shapes(
    x: Tensor,
    states: Tensor | Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """Outputs of all steps and the last states, (layers * directions, batch, width) each, of no particular values."""
    kept = [states] if isinstance(states, Tensor) else list(states)
    width = (2 if bidirectional else 1) * kept[0].shape[-1]
    return (x.new_empty((*x.shape[:2], width)), *(torch.empty_like(state) for state in kept))
