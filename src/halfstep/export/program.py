"""What torch's ONNX exporter is handed, so that it does nothing twice.

``torch.export`` has traced the network once, at capture. Handed a module, the exporter would trace it a second time,
and a third time to decompose operators that it has no translation for; and it would parse the source of its
translations of all operators. That is most of an export. It is handed an exported program, with the translations of the
operators that are in it. Before it translates it runs the graph once more over stand-ins, to find operands of several
types; where all is float32 there are none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter, getitem
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils import _pytree as pytree

aten = torch.ops.aten
CASTS = (aten.scalar_tensor.default, torch.ops.prims.convert_element_type.default)


class Program(ExportedProgram):
    """An exported program that is traced again only where operators of it are to be decomposed."""

    def run_decompositions(
        self, decomp_table: dict[Any, Callable[..., Any]] | None = None, *args: Any, **kwargs: Any
    ) -> ExportedProgram:
        """The program with the operators of the table decomposed; itself, if it has none of them."""
        if decomp_table is not None and not self.operators() & set(decomp_table):
            return self
        decomposed: ExportedProgram = super().run_decompositions(decomp_table, *args, **kwargs)
        return decomposed

    def operators(self) -> set[Any]:
        """What its nodes call, those in the bodies of branches too."""
        modules = (module for module in self.graph_module.modules() if isinstance(module, fx.GraphModule))
        return {
            node.target for module in modules for node in module.graph.nodes if node.op == "call_function"
        }

    def of_one_type(self) -> bool:
        """Whether no operator reads values of several types: all tensors are float32, and numbers beside them floats.

        False too where there is something to take out before a translation: assertions, bodies of branches.
        """
        if sum(isinstance(module, fx.GraphModule) for module in self.graph_module.modules()) > 1:
            return False
        nodes = self.graph_module.graph.nodes
        values = (value for node in nodes for value in pytree.tree_leaves(node.meta.get("val")))
        if any(isinstance(value, torch.Tensor) and value.dtype != torch.float32 for value in values):
            return False
        return not any(map(_promotes, nodes))


#: What operators take a number or a tensor as.
_PROMOTED = ("Tensor", "Optional[Tensor]", "number", "Optional[number]")


def to_onnx(program: Program, opset: int, own: Mapping[Any, Callable[..., Any]]) -> torch.onnx.ONNXProgram:
    """``program`` as ONNX, optimized.

    Args:
        program: of :func:`program_of`.
        opset: the version of ONNX's operators.
        own: translations of operators that torch has none for.
    """
    if (registry := _registry(program, opset, own)) is not None:
        from torch.onnx._internal.exporter import _core

        if program.of_one_type() and (found := _at_once(program, opset, registry)) is not None:
            return found
        translated: torch.onnx.ONNXProgram = _core.export(
            program, registry=registry, opset_version=opset, optimize=True, verbose=False
        )
        return translated
    exported = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=opset,
        custom_translation_table=dict(own),
        verbose=False,
        optimize=True,
    )
    assert exported is not None
    return exported


def _at_once(program: Program, opset: int, registry: Any) -> torch.onnx.ONNXProgram | None:
    """``program`` translated as it is: what torch's exporter does once operators are decomposed and types promoted.

    That is not part of torch's interface either; None with a version that does it otherwise.
    """
    try:
        from torch.onnx._internal._lazy_import import onnxscript_apis  # type: ignore[attr-defined]
        from torch.onnx._internal.exporter._core import _exported_program_to_onnx_program as translate

        convert = onnxscript_apis.convert_version
    except (ImportError, AttributeError):
        return None
    found: torch.onnx.ONNXProgram = translate(program, registry=registry)
    found.model = convert(found.model, opset)
    found.optimize()
    return found


def _promotes(node: fx.Node) -> bool:
    """Whether a node may read a whole number where it computes with floats, or is an assertion."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    schema = node.target._schema
    if "assert" in schema.name or "constrain" in schema.name:
        return True
    named = {argument.name: str(argument.type) for argument in schema.arguments}
    given = [
        *zip(node.args, named.values(), strict=False),
        *((x, named[name]) for name, x in node.kwargs.items()),
    ]
    return any(
        isinstance(x.meta.get("val") if isinstance(x, fx.Node) else x, (int, torch.SymInt, torch.SymFloat))
        for x, kind in given
        if kind in _PROMOTED
    )


def _registry(program: Program, opset: int, own: Mapping[Any, Callable[..., Any]]) -> Any:
    """Torch's registry of translations with no more than ``program`` needs; None where it needs decompositions too.

    The registry is not part of torch's interface. With a version that has another one the whole registry is made, which
    takes longer and comes to the same.
    """
    try:
        from onnxscript.function_libs.torch_lib import ops, registration
        from torch.onnx._internal.exporter import _registration
        from torch.onnx._internal.exporter._torchlib import _torchlib_registry

        assert ops is not None  # importing it fills the registry
        known, registry = registration.default_registry, _registration.ONNXRegistry()
        registry._opset_version = opset
        for meta in _torchlib_registry.get_torchlib_ops():
            registry._register(meta.fx_target, meta)
        for operator, function in own.items():
            registry.register_op(operator, function)
        targets = program.operators()
        for target in targets.union(*map(_may_become, targets)):
            name = _name_in_torchlib(target)
            for function in known[name].overloads if name in known else ():
                registry._register(target, _registration.OnnxDecompMeta(function, target, None))
        registry._cleanup_registry_based_on_opset_version()  # without those that need a later one
        # Elements of operators with several results need no translation, those of ONNX's sequences do.
        if not all(map(registry.is_registered, targets - {getitem})):
            return None
    except (ImportError, AttributeError, TypeError):
        return None
    return registry


def _name_in_torchlib(target: Any) -> str:
    """What the translation of an operator, or of a function of Python's on sizes, goes by."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target.name())
    return f"{target.__module__}::{target.__name__}"  # _operator::getitem


def _may_become(target: Any) -> list[Any]:
    """What the exporter writes for an operator on values of several types: a cast, another overload."""
    if not isinstance(target, torch._ops.OpOverload):
        return []
    packet = target.overloadpacket
    return [*CASTS, *(getattr(packet, name) for name in packet.overloads() if name != target._overloadname)]


def program_of(module: fx.GraphModule) -> Program:
    """``module`` as an exported program; its tensors are not copied.

    Args:
        module: takes flat values and returns a tuple, on the CPU. Every node has what was traced there, with the sizes
            that vary, in ``meta["val"]``.
    """
    mode = _mode(module.graph)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    state: dict[str, torch.Tensor] = {}
    inputs: list[InputSpec] = []
    lifted: dict[str, fx.Node] = {}
    bodies: dict[str, Any] = {}
    for node in module.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        tensor = attrgetter(name)(module)
        if not isinstance(tensor, torch.Tensor):  # the body of a branch, which the exporter wants at the root
            bodies[name.replace(".", "_")] = tensor
            continue
        if name not in lifted:
            lifted[name] = graph.placeholder(f"tensor_{len(lifted)}")
            lifted[name].meta = {"val": mode.from_tensor(tensor.detach(), static_shapes=True)}
            state[name] = tensor.detach()  # stays here where the network moves to a device again
            argument = TensorArgument(lifted[name].name)
            inputs.append(InputSpec(InputKind.BUFFER, argument, name, persistent=True))
        copies[node] = lifted[name]
    for node in module.graph.nodes:
        if node not in copies:
            copy = copies[node] = graph.node_copy(node, copies.__getitem__)
            if copy.op == "get_attr":
                copy.target = str(copy.target).replace(".", "_")
            copy.meta["val"] = pytree.tree_map_only(
                torch.Tensor, lambda x: _on_host(mode, x), node.meta.get("val")
            )
            if copy.target is aten.adaptive_avg_pool2d.default and list(copy.args[1]) == [1, 1]:  # type: ignore[arg-type]
                # As torch decomposes it
                copy.target, copy.args = (aten.mean.dim, (copy.args[0], [-1, -2], True))
    given = [_argument(node) for node in graph.find_nodes(op="placeholder")[len(lifted) :]]
    (end,) = graph.find_nodes(op="output")
    returned = [_argument(node) for node in end.args[0]]
    call = ModuleCallSignature(  # without names, which decompositions would change
        [],
        [],
        in_spec=pytree.tree_structure((tuple(range(len(given))), {})),
        out_spec=pytree.tree_structure(tuple(range(len(returned)))),
    )
    return Program(
        bodies,
        graph,
        ExportGraphSignature(
            [*inputs, *(InputSpec(InputKind.USER_INPUT, argument, None) for argument in given)],
            [OutputSpec(OutputKind.USER_OUTPUT, argument, None) for argument in returned],
        ),
        state,
        {},
        [ModuleCallEntry("", call)],
    )


def _argument(node: fx.Node) -> Any:
    value = node.meta["val"]
    return (
        TensorArgument(node.name) if isinstance(value, torch.Tensor) else ConstantArgument(node.name, value)
    )


def _mode(graph: fx.Graph) -> FakeTensorMode:
    """The mode that the graph was traced in, which knows the sizes that vary."""
    values = (node.meta.get("val") for node in graph.find_nodes(op="placeholder"))
    mode: FakeTensorMode = next(value.fake_mode for value in values if isinstance(value, FakeTensor))
    return mode


def _on_host(mode: FakeTensorMode, value: torch.Tensor) -> torch.Tensor:
    """What was traced, as if on the CPU; a tensor of numbers as one that was traced."""
    if not isinstance(value, FakeTensor):
        return mode.from_tensor(value.detach().cpu(), static_shapes=True)
    return value if value.device.type == "cpu" else value.cpu()
