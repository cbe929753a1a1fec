"""Files and inputs that cannot be taken: one clear error each, whatever is wrong with them."""

from contextlib import suppress

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

import halfstep as hs
from halfstep.errors import CaptureError, DataError, HalfstepError
from halfstep.onnx_in import elementwise
from halfstep.onnx_in.from_file import layers_of
from halfstep.onnx_in.table import TABLE
from tests.onnx_in.files import write

RELU = helper.make_node("Relu", ["x"], ["y"], name="relu")


def refused(path, *words, inputs=None):
    with pytest.raises(CaptureError) as caught:
        hs.from_onnx(path, inputs)
    for word in words:
        assert word in str(caught.value)


def simple(path, nodes=(RELU,), **options):
    return write(path, list(nodes), {"x": ["n", 3]}, {"y": None}, **options)


def test_no_file(tmp_path):
    refused(tmp_path / "none.onnx", "no such file")


def test_no_onnx_file(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"GIF89a, or some such")
    refused(tmp_path / "m.onnx", "is no ONNX file, or a damaged one")


def test_a_truncated_file(tmp_path):
    path = simple(tmp_path / "m.onnx", stored={"w": np.zeros((50, 50), np.float32)})
    path.write_bytes(path.read_bytes()[:-5000])
    refused(path, "is no ONNX file, or a damaged one")


def test_an_unknown_operator_is_named_with_its_domain_and_version(tmp_path):
    node = helper.make_node("Whatever", ["x"], ["y"], name="odd", domain="vendor")
    refused(simple(tmp_path / "m.onnx", [node], domains=("vendor",)), "'odd'", "vendor Whatever, version 1")


def test_an_unknown_opset(tmp_path):
    path = simple(tmp_path / "m.onnx")
    model = onnx.load(path)
    model.opset_import[0].version = 99
    onnx.save(model, path)
    refused(path, "is of operator set 99, needed 1 to")


def test_a_cycle(tmp_path):
    nodes = [helper.make_node("Add", ["x", "b"], ["a"]), helper.make_node("Relu", ["a"], ["b"])]
    refused(write(tmp_path / "m.onnx", nodes, {"x": ["n", 3]}, {"b": None}), "cycle")


def test_a_name_made_twice(tmp_path):
    nodes = [RELU, helper.make_node("Sigmoid", ["x"], ["y"])]
    refused(simple(tmp_path / "m.onnx", nodes), "two nodes make a tensor called 'y'")


def test_nodes_of_one_name(tmp_path):
    nodes = [
        helper.make_node("Relu", ["x"], ["h"], name="same"),
        helper.make_node("Relu", ["h"], ["y"], name="same"),
    ]
    refused(simple(tmp_path / "m.onnx", nodes), "same node name (same)")


def test_an_output_that_nothing_makes(tmp_path):
    refused(write(tmp_path / "m.onnx", [RELU], {"x": ["n", 3]}, {"z": None}), "output 'z' is made by no node")


def test_a_training_graph(tmp_path):
    path = simple(tmp_path / "m.onnx")
    model = onnx.load(path)
    model.training_info.add()
    onnx.save(model, path)
    refused(path, "graph for training")


def test_shapes_that_do_not_fit(tmp_path):
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    refused(simple(tmp_path / "m.onnx", [node], stored={"w": np.zeros((4, 4), np.float32)}), "onnxruntime")


def test_a_shape_that_depends_on_values(tmp_path):
    nodes = [
        helper.make_node("Cast", ["n"], ["size"], to=TensorProto.INT64),
        helper.make_node("Expand", ["x", "size"], ["y"], name="grow"),
    ]
    path = write(tmp_path / "m.onnx", nodes, {"x": ["n", 3], "n": [2]}, {"y": None})
    inputs = {"x": torch.randn(2, 3), "n": torch.tensor([2.0, 3.0])}
    refused(path, "'grow'", "depend on the values of a tensor", inputs=inputs)


def external(tmp_path, location, length=None):
    path = tmp_path / "folder" / "m.onnx"
    path.parent.mkdir()
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    simple(path, [node], stored={"w": np.ones((3, 3), np.float32)})
    model = onnx.load(path)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=str(location))
    if length:
        tensor.external_data.add(key="length", value=str(length))
    onnx.save(model, path)
    return path


def test_tensors_beside_the_file_are_read(tmp_path):
    path = external(tmp_path, "weights.bin")
    path.with_name("weights.bin").write_bytes(np.eye(3, dtype=np.float32).tobytes())
    x = torch.randn(2, 3)
    assert torch.equal(hs.from_onnx(path)(x), x)


def test_missing_tensors_beside_the_file(tmp_path):
    refused(
        external(tmp_path, "weights.bin"), "'w' lies in 'weights.bin' beside the file, which is not there"
    )


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/hostname", "a/../../secret.bin"])
def test_no_path_leaves_the_folder(tmp_path, location):
    (tmp_path / "secret.bin").write_bytes(bytes(36))
    refused(external(tmp_path, location), "outside the file's folder")


def test_no_link_leaves_the_folder(tmp_path):
    path = external(tmp_path, "weights.bin")
    (tmp_path / "secret.bin").write_bytes(bytes(36))
    path.with_name("weights.bin").symlink_to(tmp_path / "secret.bin")
    refused(path, "outside the file's folder")


def test_tensors_beside_the_file_that_are_too_short(tmp_path):
    path = external(tmp_path, "weights.bin", length=36)
    path.with_name("weights.bin").write_bytes(bytes(20))
    refused(path, "end behind the end of 'weights.bin'")


def test_tensors_beside_the_file_of_another_size_than_their_shape(tmp_path):
    path = external(tmp_path, "weights.bin", length=32)
    path.with_name("weights.bin").write_bytes(bytes(40))
    refused(path, "tensor 'w' is damaged: 32 bytes lie in 'weights.bin', its shape needs 36")


def test_a_node_that_answers_otherwise_is_named_with_both_values(tmp_path, monkeypatch):
    nodes = [
        helper.make_node("Neg", ["x"], ["h"], name="before"),
        helper.make_node("Relu", ["h"], ["y"], name="relu"),
    ]
    monkeypatch.setitem(TABLE, ("", "Relu"), lambda node, x: elementwise.tensor(x).clamp_min(0.25))
    path = simple(tmp_path / "m.onnx", nodes)
    x = -torch.tensor([[1.0, 2.0, 0.0], [3.0, 4.0, 5.0]])
    refused(
        path, "node 'relu' (ai.onnx Relu, version 21)", "got 0.25, onnxruntime has 0.0 at (0, 2)", inputs=x
    )


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (torch.randn(2, 4), "input 'x': got shape (2, 4), needed (n, 3)"),
        (torch.randn(2, 3).double(), "input 'x': got torch.float64, needed torch.float32"),
        ((torch.randn(2, 3), torch.randn(2, 3)), "got the inputs 2 in order, needed 'x'"),
        ({"z": torch.randn(2, 3)}, "got the inputs 'z', needed 'x'"),
        ([[1.0]], "input 'x': got list, needed a tensor"),
    ],
)
def test_inputs_that_do_not_fit(tmp_path, inputs, words):
    with pytest.raises(DataError) as caught:
        hs.from_onnx(simple(tmp_path / "m.onnx"), inputs)
    assert words in str(caught.value)


def test_a_dynamic_size_beside_the_batch_asks_for_inputs(tmp_path):
    path = write(tmp_path / "m.onnx", [RELU], {"x": ["n", "time"]}, {"y": None})
    with pytest.raises(DataError, match=r"of shape \(n, time\).*give inputs="):
        hs.from_onnx(path)
    assert hs.from_onnx(path, torch.randn(2, 5))(torch.randn(2, 5)).shape == (2, 5)


def test_a_tensor_of_another_size_than_its_shape(tmp_path):
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    path = simple(tmp_path / "m.onnx", [node], stored={"w": np.ones((3, 4), np.float32)})
    model = onnx.load(path)
    model.graph.initializer[0].dims[1] = 5
    onnx.save(model, path)
    with pytest.raises(CaptureError, match=r"m.onnx: tensor 'w' is damaged \(.*12.*\); export or download"):
        hs.from_onnx(path, torch.zeros(2, 3))


def test_damaged_files_end_in_an_error(tmp_path):
    """Bytes flipped, cut and repeated at random: refused, or still a network; never anything else."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    path = simple(tmp_path / "m.onnx", nodes, stored={"w": np.ones((3, 3), np.float32)})
    whole, generator = path.read_bytes(), np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(generator.integers(1, 4)):
            damaged[generator.integers(len(damaged))] = generator.integers(256)
        if generator.random() < 0.3:
            del damaged[generator.integers(len(damaged)) :]
        path.write_bytes(damaged)
        with suppress(HalfstepError):
            hs.from_onnx(path, torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("operator", "name", "said"),
    [
        ("QLinearConv", "features/conv", "(QLinearConv at node 'features/conv')"),
        ("MatMulInteger", "", "(MatMulInteger at node 'y')"),
        ("QGemm", "fc", "(QGemm at node 'fc')"),
    ],
)
def test_a_file_whose_layers_compute_in_integers(operator, name, said, tmp_path):
    """Only what it was made from has the float weights; `init` lists no layers of it either."""
    domain = "com.microsoft" if operator == "QGemm" else ""
    node = helper.make_node(operator, ["x"], ["y"], name=name, domain=domain)
    path = simple(tmp_path / "m.onnx", [node], domains=("com.microsoft",))
    refused(path, f"is quantized already {said}; give the float file that it was made from")
    with pytest.raises(CaptureError, match="is quantized already"):
        layers_of(path)


CODE = 'q" if open(r"{}", "w") else "q'


@pytest.mark.parametrize("part", ["node", "weight", "between", "input", "output"])
@pytest.mark.parametrize("name", [CODE, "back\\slash", "two\nlines", "it's", "x²"])
def test_names_are_never_code(part, name, tmp_path):
    """What is read stays under the file's names, but where they would break the code that torch generates."""
    written = tmp_path / "written"
    name = name.format(written)
    names = {
        each: name if each == part else each for each in ("node", "weight", "between", "input", "output")
    }
    nodes = [
        helper.make_node("MatMul", [names["input"], names["weight"]], [names["between"]], name=names["node"]),
        helper.make_node("Relu", [names["between"]], [names["output"]], name="relu"),
    ]
    weight = np.random.default_rng(0).standard_normal((3, 4), np.float32)
    declared = {names["input"]: ["n", 3]}, {names["output"]: ["n", 4]}
    path = write(tmp_path / "m.onnx", nodes, *declared, {names["weight"]: weight})
    x = torch.randn(64, 3)
    q = hs.prepare(path, x)
    hs.observe(q, [x])
    hs.calibrate(q)
    proof = hs.verify(hs.export_onnx(q, tmp_path / "q.onnx"), q, [x])
    assert not written.exists()
    assert [layer.integer for layer in proof.layers] == [True] and proof.parity.sqnr > 60
    file = onnx.load(tmp_path / "q.onnx")
    assert file.graph.input[0].name == names["input"] and file.graph.output[0].name == names["output"]
