"""The public names, and what importing them costs."""

import subprocess
import sys

import halfstep as hs


def test_the_names_are_there_and_sorted():
    assert all(hasattr(hs, name) for name in hs.__all__)
    capitals = [name for name in hs.__all__ if not name[0].islower()]
    assert hs.__all__ == capitals + sorted(set(hs.__all__) - set(capitals))


def test_importing_loads_torch_and_little_else():
    heavy = [
        "onnx",
        "onnx_ir",
        "onnxruntime",
        "onnxscript",
        "numba",
        "scipy",
        "matplotlib",
        "sklearn",
        "rich",
    ]
    code = f"import sys, halfstep; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
