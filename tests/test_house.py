"""The house stays one: no class has a twin's name, no file is a stub, no signature grows in silence."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import pytest

import halfstep

ROOT = Path(halfstep.__file__).parent
FILES = {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}

#: A table of a runtime each; the entry point.
SMALL = {"targets/openvino.py", "targets/tensorrt.py", "cli/__main__.py", "__main__.py"}

#: Functions of more than eight parameters: the faces of the ladder, compiled loops, operators of torch and ONNX.
WIDE = {
    "ladder/prepare.py prepare",
    "ladder/quantize.py quantize",
    "cli/quantize.py quantize",
    "ladder/alone.py partial",
    "statistics/kernels.py hand_over",
    "statistics/kernels.py count",
    "onnx_in/recurrent.py lstm",
    "export/recurrent.py _translate",  # what torch's operator takes
    "graph/recurrences.py _shapes",
}

#: Words of our own that the field has others for (CONTRIBUTING.md has the words).
FORMER = {"haste", "portrait", "ascent", "shelf", "nought"}


def test_public_classes_have_names_of_their_own():
    found = defaultdict(list)
    for name, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(name)
    assert {name: places for name, places in found.items() if len(places) > 1} == {}


@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith("__init__.py")])
def test_a_file_holds_a_whole_idea(name):
    lines = FILES[name].read_text(encoding="utf-8").count("\n")
    assert lines >= 40 or name in SMALL, f"{name}: {lines} lines; which room does it belong to?"
    assert lines <= 500, f"{name}: {lines} lines; which second idea is in it?"


def test_signatures_are_short():
    wide = set()
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                given = [
                    a.arg for a in (*node.args.args, *node.args.kwonlyargs) if a.arg not in ("self", "cls")
                ]
                if len(given) > 8:
                    wide.add(f"{name} {node.name}")
    assert wide <= WIDE, wide - WIDE


def test_the_fields_words_are_used():
    named = {
        (name, part)
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        for part in node.name.lower().split("_")
    } | {(name, part) for name in FILES for part in name.removesuffix(".py").replace("/", "_").split("_")}
    assert {(name, part) for name, part in named if part in FORMER} == set()
