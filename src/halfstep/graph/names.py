"""Readable names for nodes: the module path in the user's model, and the operation where the path alone is not one."""

from __future__ import annotations

from torch import fx

from halfstep.graph.operators import describe

#: The module that stands for a node of an ONNX file.
ONNX_NODE = "halfstep.onnx_in.network.Step"


def readable_names(graph: fx.Graph) -> dict[fx.Node, str]:
    """A unique name for every placeholder and call of ``graph``.

    A node of a leaf module of torch (``nn.Conv2d``), or of what stands for a node of an ONNX file, is called by the
    module's path, ``layer1.0.conv1``; any other by the path of the module whose code calls it and its kind,
    ``layer1.0.add``. A second call of the same gets ``:2`` and so on.
    """
    names: dict[fx.Node, str] = {}
    count: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            name = str(node.target)
        elif node.op == "call_function":
            name = _name(node)
        else:
            continue
        count[name] = count.get(name, 0) + 1
        names[node] = name if count[name] == 1 else f"{name}:{count[name]}"
    return names


def _name(node: fx.Node) -> str:
    op = describe(node)
    kind = op.kind if op else node.name
    stack = list(node.meta.get("nn_module_stack", {}).values())
    if not stack:
        return kind
    path, owner = stack[-1]
    leaf = isinstance(owner, str) and (owner.startswith("torch.nn.modules.") or owner == ONNX_NODE)
    path = path.split("@")[0]  # torch marks the second call of a shared module by "@1"
    if owner == ONNX_NODE and any(_path(user) == path for user in node.users):
        return f"{path}.{kind}"  # what the node makes has its name, what it makes that of has not
    if leaf and path and "container" not in owner and "MultiheadAttention" not in owner:
        return str(path)
    return f"{path}.{kind}" if path else kind


def _path(node: fx.Node) -> str:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]).split("@")[0] if stack else ""
