"""The cores that a process may use: affinity, and quotas of control groups."""

import math
import os

import onnx
import pytest

from halfstep import cores
from halfstep.runtime import onnxruntime, openvino


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine whose process may run on so many cores, with control groups as given: path -> content."""

    def make(allowed, groups="", **files):
        monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: set(range(allowed)), raising=False)
        monkeypatch.setattr(cores, "OWN_GROUP", tmp_path / "cgroup")
        monkeypatch.setattr(cores, "CGROUPS", tmp_path / "fs")
        if groups:
            (tmp_path / "cgroup").write_text(groups)
        for name, content in files.items():
            path = (
                tmp_path
                / "fs"
                / name.replace("__", "/").replace("_max", ".max").replace("cpu_cfs", "cpu.cfs")
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return cores.available_cores()

    return make


def test_affinity_counts(machine):
    assert machine(3) == 3


@pytest.mark.parametrize(
    ("content", "granted"),
    [("max 100000", 8), ("200000 100000", 2), ("250000 100000", 2), ("50000 100000", 1), ("what", 8)],
)
def test_a_quota_counts_in_whole_cores(machine, content, granted):
    assert machine(8, "0::/", cpu_max=content) == granted


def test_the_tightest_of_nested_groups_counts(machine):
    files = {"a__cpu_max": "400000 100000", "a__b__cpu_max": "max 100000", "cpu_max": "600000 100000"}
    assert machine(8, "0::/a/b\n", **files) == 4


def test_a_path_of_the_host_s_leads_to_what_is_mounted(machine):
    assert machine(8, "0::/docker/1234\n", cpu_max="300000 100000") == 3


def test_groups_of_version_1(machine):
    files = {"cpu__x__cpu_cfs_quota_us": "500000\n", "cpu__x__cpu_cfs_period_us": "100000\n"}
    assert machine(8, "5:memory:/y\n4:cpu,cpuacct:/x\n", **files) == 5
    files["cpu__x__cpu_cfs_quota_us"] = "-1"
    assert machine(8, "4:cpu,cpuacct:/x\n", **files) == 8


def test_where_nothing_is_told_the_machine_s_cores_count(monkeypatch, machine):
    assert machine(8) == 8
    assert cores.quota() == math.inf
    monkeypatch.delattr(cores.os, "sched_getaffinity", raising=False)
    assert cores.available_cores() == os.cpu_count()


def test_sessions_take_no_more(monkeypatch, tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(adding(1.0), path)
    for runtime in (onnxruntime, openvino):
        monkeypatch.setattr(runtime, "available_cores", lambda: 1)
    assert onnxruntime.open_session(path).get_session_options().intra_op_num_threads == 1
    assert onnxruntime.open_session(path, 2).get_session_options().intra_op_num_threads == 2
    pytest.importorskip("openvino")
    assert openvino.compile_model(path, None).get_property("INFERENCE_NUM_THREADS") == 1


def adding(number):
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [3]) for name in "xy"]
    weight = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [3], [number] * 3)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [weight]
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
