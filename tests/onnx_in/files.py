"""Small ONNX files."""

import logging
import warnings

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper


def write(path, nodes, inputs, outputs, stored=None, opset=21, domains=(), **fields):
    """A file of nodes: ``inputs`` and ``outputs`` are shapes by name, floats unless a pair (type, shape)."""

    def declared(values):
        pairs = {n: v if isinstance(v, tuple) else (TensorProto.FLOAT, v) for n, v in values.items()}
        return [helper.make_tensor_value_info(name, *pair) for name, pair in pairs.items()]

    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in (stored or {}).items()]
    graph = helper.make_graph(nodes, "net", declared(inputs), declared(outputs), tensors)
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10, **fields)
    onnx.save(model, path)
    return path


def export(model, inputs, path, fixed=False, **options):
    """What torch's exporter writes, with a dynamic batch unless it is to be fixed."""
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own deprecations
            shapes = None if fixed else tuple({0: torch.export.Dim.DYNAMIC} for _ in args)
            torch.onnx.export(
                model.eval(), args, path, dynamo=True, dynamic_shapes=shapes, verbose=False, **options
            )
    finally:
        logging.disable(logging.NOTSET)
    return path
