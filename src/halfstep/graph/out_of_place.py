"""A traced graph as functions alone: without writes, and in the operators that torch's own pass leaves.

``torch.export`` traces what the code calls: writes into tensors, reshapes of any kind, batch norms. Its
``run_decompositions`` makes a graph of functions of that by running it twice more over stand-ins for tensors, which
takes two to three times as long as the first trace. What it makes of the operators that most networks consist of
follows from the trace, which knows the sizes of every tensor and which of them share memory. So those are rewritten in
one pass over the graph, and come to the same graph; what is not in the tables here is left to torch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from halfstep.graph.shapes import varies

aten = torch.ops.aten

#: Operators that torch's pass keeps, and whose result is a tensor of its own.
KEPT = frozenset(
    {
        aten.adaptive_avg_pool1d.default,
        aten.adaptive_avg_pool2d.default,
        aten.add.Tensor,
        aten.avg_pool2d.default,
        aten.cat.default,
        aten.clamp.default,
        aten.conv1d.default,
        aten.conv2d.default,
        aten.div.Tensor,
        aten.elu.default,
        aten.embedding.default,
        aten.gelu.default,
        aten.group_norm.default,
        aten.hardsigmoid.default,
        aten.hardswish.default,
        aten.hardtanh.default,
        aten.layer_norm.default,
        aten.leaky_relu.default,
        aten.linear.default,
        aten.matmul.default,
        aten.max_pool2d.default,
        aten.mean.dim,
        aten.mul.Tensor,
        aten.relu.default,
        aten.relu6.default,
        aten.roll.default,
        aten.scaled_dot_product_attention.default,
        aten.sigmoid.default,
        aten.silu.default,
        aten.softmax.int,
        aten.sub.Tensor,
        aten.tanh.default,
        aten.upsample_nearest2d.vec,
    }
)

#: Operators that torch's pass keeps, and whose result shares the memory of what they read.
VIEWS = frozenset(
    {
        aten.expand.default,
        aten.permute.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.transpose.int,
        aten.unbind.int,
        aten.unsqueeze.default,
        aten.view.default,
        operator.getitem,
    }
)

#: Operators that write into their first argument, and the function that each computes.
IN_PLACE: dict[Any, Any] = {
    aten.add_.Tensor: aten.add.Tensor,
    aten.elu_.default: aten.elu.default,
    aten.hardsigmoid_.default: aten.hardsigmoid.default,
    aten.hardswish_.default: aten.hardswish.default,
    aten.hardtanh_.default: aten.hardtanh.default,
    aten.leaky_relu_.default: aten.leaky_relu.default,
    aten.mul_.Tensor: aten.mul.Tensor,
    aten.relu6_.default: aten.hardtanh.default,
    aten.relu_.default: aten.relu.default,
    aten.sigmoid_.default: aten.sigmoid.default,
    aten.silu_.default: aten.silu.default,
    aten.sub_.Tensor: aten.sub.Tensor,
    aten.tanh_.default: aten.tanh.default,
}

#: What the function is given beside, where the operator that writes says it by its name alone.
MEANT: dict[Any, tuple[int, ...]] = {aten.relu6_.default: (0, 6)}

#: What torch says of nodes that no module's code has called.
_NOWHERE = {"_empty_nn_module_stack_from_metadata_hook": ("_empty_nn_module_stack_from_metadata_hook",) * 2}


def out_of_place(traced: fx.Graph) -> fx.Graph | None:
    """The graph that ``run_decompositions({})`` would make of a traced one, but for the names of its nodes.

    Args:
        traced: of a program's module (``torch.export.ExportedProgram.module``), with what was traced in
            ``meta["val"]``; left as it is.

    Returns:
        A graph over the same tensors; None where the traced one holds an operator, or a use of one, that only torch's
        pass knows what to make of.
    """
    rewriting = _Rewriting(traced)
    try:
        for node in traced.nodes:
            rewriting.take(node)
        return rewriting.finished()
    except _Unknown:
        return None


class _Unknown(Exception):
    """The graph has something that is not in the tables."""


class _Rewriting:
    """A graph of functions in the making.

    Attributes:
        graph: as far as it has come.
    """

    def __init__(self, traced: fx.Graph) -> None:
        self.graph = fx.Graph()
        self._inputs = traced.find_nodes(op="placeholder")
        #: What stands for each traced node now: after a write another node than before it.
        self._now: dict[fx.Node, fx.Node] = {}
        #: By memory, the traced nodes whose values lie there, in order.
        self._sharing: dict[Any, list[fx.Node]] = {}
        self._sizes: dict[str, fx.Node] = {}
        self._rules: dict[Any, Callable[[fx.Node], fx.Node]] = {
            aten.batch_norm.default: self._batch_norm,
            aten.dropout.default: self._dropout,
            aten.flatten.using_ints: self._flatten,
            aten.reshape.default: self._reshape,
            aten.sym_size.int: self._size,
        }

    def take(self, node: fx.Node) -> None:
        """Add what becomes of a node of the traced graph.

        Raises:
            _Unknown: if that is for torch to say.
        """
        if node.op in ("get_attr", "placeholder", "output"):
            self._now[node] = self._copy(node)
        elif node.target in self._rules:
            self._now[node] = self._rules[node.target](node)
        elif node.target in KEPT or node.target in VIEWS:
            self._now[node] = self._copy(node)
        elif node.target in IN_PLACE:
            self._write(node)
        else:
            raise _Unknown
        for memory in _memories(node.meta.get("val")):
            self._sharing.setdefault(memory, []).append(node)
        if node.op == "placeholder" and node is self._inputs[-1]:
            self._add_sizes()

    def finished(self) -> fx.Graph:
        """The graph, without the sizes that nothing reads.

        Raises:
            _Unknown: if more than one is read.
        """
        unread = [node for node in self._sizes.values() if not node.users]
        if len(self._sizes) - len(unread) > 1:
            raise _Unknown
        for node in unread:
            self.graph.erase_node(node)
        return self.graph

    def _copy(self, node: fx.Node) -> fx.Node:
        copied = self.graph.node_copy(node, self._now.__getitem__)
        copied.meta = dict(node.meta)
        return copied

    def _call(self, node: fx.Node, target: Any, args: Sequence[Any], value: Any, **kwargs: Any) -> fx.Node:
        """A call in the place of a traced node, with what that is known for but its value."""
        made = self.graph.call_function(target, tuple(args), kwargs)
        made.meta = {**node.meta, "val": value}
        return made

    # writes

    def _write(self, node: fx.Node) -> None:
        """The function of an operator that writes; whoever reads what it wrote into reads its result from now on.

        Known is what writes into a result that nothing else shares its memory with: of what is a view of something, or
        something's view, torch's pass makes that view anew.
        """
        written, *others = node.args
        function = IN_PLACE[node.target]
        if not isinstance(written, fx.Node) or not self._of_its_own(written):
            raise _Unknown
        value = written.meta["val"]
        for other in (each for each in others if isinstance(each, fx.Node)):
            # With other types or orders of memory the function's result would have others, too.
            seen = other.meta.get("val")
            if not (isinstance(seen, Tensor) and seen.dtype == value.dtype and _alike(seen, value)):
                raise _Unknown
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._now.__getitem__)
        made = self._call(node, function, (*args, *MEANT.get(node.target, ())), node.meta["val"], **kwargs)
        for each in (*self._sharing[_memory(value)], node):
            self._now[each] = made

    def _of_its_own(self, written: fx.Node) -> bool:
        """Whether a node's value is the result of a function that no view has been taken of."""
        value = written.meta.get("val")
        if not isinstance(value, FakeTensor) or written.op != "call_function":
            return False
        return all(
            each.target in KEPT or each.target in IN_PLACE or each.target is aten.batch_norm.default
            for each in self._sharing[_memory(value)]
        )

    # operators that become others

    def _batch_norm(self, node: fx.Node) -> fx.Node:
        x, weight, bias, mean, variance, training, momentum, eps, _ = node.args
        value = node.meta["val"]
        if training or node.kwargs or mean is None or variance is None or not isinstance(value, FakeTensor):
            raise _Unknown
        with value.fake_mode:
            values = (value, value.new_empty(0), value.new_empty(0))
        args = fx.map_arg((x, weight, bias, mean, variance), self._now.__getitem__)
        norm = aten._native_batch_norm_legit_no_training.default
        made = self._call(node, norm, (*args, momentum, eps), values)
        return self._call(node, operator.getitem, (made, 0), value)

    def _dropout(self, node: fx.Node) -> fx.Node:
        """In evaluation a copy."""
        x, _, training = node.args
        value = node.meta["val"]
        if training or not isinstance(value, FakeTensor):
            raise _Unknown
        with value.fake_mode:
            copied = value.clone()
        return self._call(node, aten.clone.default, (self._now[x],), copied)  # type: ignore[index]

    def _flatten(self, node: fx.Node) -> fx.Node:
        source, value = node.args[0], node.meta["val"]
        assert isinstance(source, fx.Node)
        if source.meta["val"].dim() == value.dim():  # then it is what it reads
            raise _Unknown
        return self._reshaped(node, self._sizes_of(value.shape))

    def _reshape(self, node: fx.Node) -> fx.Node:
        if node.kwargs:
            raise _Unknown
        shape: Any = fx.map_arg(node.args[1], self._now.__getitem__)
        return self._reshaped(node, shape)

    def _reshaped(self, node: fx.Node, shape: Sequence[Any]) -> fx.Node:
        """A view where the trace has one, else a view of a copy, with all of its sizes."""
        source, value = node.args[0], node.meta["val"]
        assert isinstance(source, fx.Node)
        x = self._now[source]
        before = source.meta["val"]
        if _memory(before) == _memory(value):
            return self._call(node, aten.view.default, (x, list(shape)), value)
        with before.fake_mode:
            copied = before.clone(memory_format=torch.contiguous_format)
        clone = self._call(node, aten.clone.default, (x,), copied, memory_format=torch.contiguous_format)
        return self._call(node, aten._unsafe_view.default, (clone, self._sizes_of(value.shape)), value)

    # sizes

    def _size(self, node: fx.Node) -> fx.Node:
        """The size of an input, which there is a node for already."""
        found: fx.Node = self._sizes_of([node.meta["val"]])[0]
        return found

    def _sizes_of(self, shape: Sequence[Any]) -> list[Any]:
        """A shape as arguments: numbers, and nodes for sizes that vary."""
        try:
            return [self._sizes[str(size)] if varies(size) else int(size) for size in shape]
        except KeyError:  # a product of sizes, say
            raise _Unknown from None

    def _add_sizes(self) -> None:
        """A node for the size of the inputs that varies, as the last of them has it: which one torch takes.

        Where several vary their order is torch's to say, see :meth:`finished`.
        """
        for node in self._inputs:
            value = node.meta.get("val")
            for axis, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
                if varies(size):
                    made = self.graph.call_function(aten.sym_size.int, (self._now[node], axis))
                    made.meta = {"val": size, "nn_module_stack": dict(_NOWHERE)}
                    if (before := self._sizes.get(str(size))) is not None:
                        self.graph.erase_node(before)
                    self._sizes[str(size)] = made


def _memory(value: Tensor) -> int:
    """What a traced tensor has in common with all that shares its memory."""
    name: int = value.untyped_storage()._cdata
    return name


def _memories(value: Any) -> list[int]:
    """That of each tensor in what a node gives."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [_memory(each) for each in values if isinstance(each, Tensor)]


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two traced tensors lie in the same order in memory."""
    return (one.is_contiguous() and other.is_contiguous()) or str(one.stride()) == str(other.stride())
