"""onnx's own cases of every operator of the table, and what of them is refused."""

import collections
import functools
import warnings

import numpy as np
import onnx
import pytest
import torch

from halfstep.errors import CaptureError
from halfstep.onnx_in.network import make_network
from halfstep.onnx_in.reader import read
from halfstep.onnx_in.table import TABLE

#: Element types of the cases that are run; torch computes in no unsigned ones of 16 bits and more.
TYPES = frozenset({"float32", "float64", "int8", "uint8", "int32", "int64", "bool"})

#: Cases that are refused, by a part of their name, and why.
REFUSED = {
    "training_mode": "statistics of a batch, as in training",
    "training_dropout": "dropout as in training",
    "averagepool_2d_dilations": "AveragePool with dilations and ceil_mode",
    "averagepool_3d_dilations_small": "AveragePool with dilations and ceil_mode",
    "ceil_mode_is_True": "AveragePool with dilations and ceil_mode",
    "lstm_with_peepholes": "peepholes",
    "maxpool_with_argmax_2d_precomputed_strides": "indices by columns",
    "tf_crop_and_resize": "crops chosen by an input",
    "reduce_max_empty_set": "an extreme of nothing",
    "reduce_min_empty_set": "an extreme of nothing",
}

#: Operators without a case that can be run here: tested below, or by the networks of the other tests.
WITHOUT_CASE = frozenset({"GlobalLpPool", "SimplifiedLayerNormalization"})


@functools.cache
def cases():
    """Those of one node, of an operator of the table, in numbers that torch computes with, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, of overflows that are meant
        from onnx.backend.test.loader import load_model_tests

        found = load_model_tests(kind="node")
    return {case.name: case for case in found if "expanded" not in case.name and _taken(case)}


def _taken(case):
    (node, *others) = case.model.graph.node
    if others or (node.domain, node.op_type) not in TABLE:
        return False
    given = [_array(x) for pair in case.data_sets for part in pair for x in part if not isinstance(x, list)]
    return len(given) == len(node.input) + len(node.output) - _left_out(node) and all(
        str(x.dtype) in TYPES for x in given
    )


def _left_out(node):
    return [*node.input, *node.output].count("")


def _array(x):
    return onnx.numpy_helper.to_array(x) if isinstance(x, onnx.TensorProto) else np.asarray(x)


def _fixed(case):
    """The case with axes, sizes and the like stored in the file, as in a network's, and what else it is given."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    given = []
    op = model.graph.node[0].op_type
    for index, (declared, x) in enumerate(zip(case.model.graph.input, case.data_sets[0][0], strict=True)):
        x = _array(x)
        sizes = index and x.dtype.kind in "iu" and x.ndim <= 1
        if (
            sizes
            or (index and x.ndim == 0)
            or op in ("Range", "ConstantOfShape")
            or (op in ("Resize", "Upsample") and index)
        ):
            model.graph.initializer.append(onnx.numpy_helper.from_array(x, declared.name))
            model.graph.input.remove(next(v for v in model.graph.input if v.name == declared.name))
        else:
            given.append(torch.from_numpy(np.array(x)))
    model.ir_version = max(model.ir_version, 4)  # from which on stored tensors are no inputs
    return model, given


def _answer(case, folder):
    model, given = _fixed(case)
    onnx.save(model, folder / "case.onnx")
    network = make_network(read(folder / "case.onnx"))
    with torch.no_grad():
        found = network.run(*given)
    return list(found.values()) if isinstance(found, dict) else [found]


def _refused(name):
    return any(part in name for part in REFUSED)


def test_cases_of_onnx(tmp_path):
    """All in one test: there are several hundred of them, each of a millisecond."""
    wrong = {}
    for name, case in cases().items():
        if _refused(name):
            continue
        try:
            got = _answer(case, tmp_path)
            for ours, theirs in zip(got, case.data_sets[0][1], strict=True):
                theirs = _array(theirs)
                assert (ours.numpy().dtype, ours.shape) == (theirs.dtype, theirs.shape)
                # onnx's own tolerance; and what float32 loses where a value is a difference of larger ones
                np.testing.assert_allclose(ours.numpy(), theirs, rtol=max(case.rtol, 1e-3), atol=1e-5)
        except Exception as error:
            wrong[name] = f"{type(error).__name__}: {error}"
    assert wrong == {}


def test_cases_that_are_refused(tmp_path):
    """They are told of, not computed otherwise; and they are few."""
    refused = [name for name in cases() if _refused(name)]
    for name in refused:
        with pytest.raises((CaptureError, IndexError)):
            _answer(cases()[name], tmp_path)
    assert [part for part in REFUSED if not any(part in name for name in refused)] == []
    assert len(refused) < 0.05 * len(cases())


def test_every_operator_has_a_case():
    counted = collections.Counter(case.model.graph.node[0].op_type for case in cases().values())
    own = {name for domain, name in TABLE if not domain}
    assert own - set(counted) == WITHOUT_CASE
    assert len(own) > 120
