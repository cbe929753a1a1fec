"""Digests of content: equal for equal values in every process, different for whatever a value computes from."""

import enum
import functools
import importlib
import operator
import random
import re
import subprocess
import sys
import threading
from collections import OrderedDict, deque, namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from halfstep.identity import Identity, rows_of_bytes


def digest(*values):
    return Identity(*values).digest


def topk(outputs, labels, k=1):
    return (outputs.topk(k).indices == labels[:, None]).any(1).float()


def above(threshold):
    def score(outputs, labels):
        return (outputs.max(1).values > threshold).float()

    return score


class Weighted:
    def __init__(self, weight):
        self.weight = weight

    def __call__(self, outputs, labels):
        return outputs[:, 0] * self.weight


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


class Settings(dict):
    __getattr__ = dict.__getitem__


class Rows(list):
    def __init__(self, rows, scale=1):
        super().__init__(rows)
        self.scale = scale

    def __iter__(self):
        return (row * self.scale for row in list.__iter__(self))


class Noisy(Rows):
    def __iter__(self):
        return (row + random.random() for row in list.__iter__(self))


class Letters(frozenset):
    pass


Point = namedtuple("Point", "x y")


class Told:
    """Says itself what its state is."""

    def __init__(self, value, cache):
        self.value, self.cache = value, cache

    def __getstate__(self):
        return {"value": self.value}


class Color(enum.Enum):
    RED = 1
    BLUE = 2


class Squares(Dataset):
    def __init__(self, count, transform):
        self.count, self.transform = count, transform

    def __getitem__(self, index):
        return self.transform(index**2)


def with_default(limit):
    def score(outputs, labels, limit=limit):
        return outputs

    return score


def compiled(source, **surroundings):
    """A function whose code and global variables are given."""
    known = {"__name__": "__main__", **surroundings}
    exec(source, known)
    return known["score"]


X = torch.arange(6.0).reshape(2, 3)
PAIRS = {
    "partial": (functools.partial(topk, k=1), functools.partial(topk, k=2)),
    "closure": (above(0.1), above(0.9)),
    "default": (with_default(1), with_default(2)),
    "callable object": (Weighted(1), Weighted(2)),
    "bound method": (Weighted(1).__call__, Weighted(2).__call__),
    "slots": (Slotted(1), Slotted(2)),
    "own state": (Told(1, 1), Told(2, 1)),
    "code": (compiled("def score(o, l): return o + 1"), compiled("def score(o, l): return o + 2")),
    "called function": (
        compiled("def of(x): return x\ndef score(o, l): return of(o)"),
        compiled("def of(x): return -x\ndef score(o, l): return of(o)"),
    ),
    "tensor": (X, X + torch.eye(2, 3) * 1e-6),
    "dtype": (X, X.double()),
    "shape": (X, X.T),
    "layout": (X.to_sparse(), (X + 1).to_sparse()),
    "array": (np.arange(4), np.arange(4)[::-1]),
    "array of objects": (np.array(["a", None], object), np.array(["b", None], object)),
    "list": ([1, 2], [2, 1]),
    "nesting": ([1, [2]], [[1], 2]),
    "list or tuple": ([1, 2], (1, 2)),
    "dict": ({"a": 1}, {"a": 2}),
    "ordered dict": (OrderedDict(a=1), OrderedDict(b=1)),
    "dict of one's own": (Settings(a=1), Settings(a=2)),
    "list of one's own": (Rows([1]), Rows([2])),
    "attribute of a list": (Rows([1], 1), Rows([1], 2)),
    "code of a list": (Rows([1]), Noisy([1])),
    "set of one's own": (Letters("ab"), Letters("ac")),
    "queue": (deque([1, 2]), deque([2, 1])),
    "record": (Point(1, 2), Point(2, 1)),
    "set": ({"a", "b"}, {"a", "c"}),
    "number or text": (1, "1"),
    "number or bool": (1, True),
    "enum": (Color.RED, Color.BLUE),
    "module": (nn.Linear(2, 2), nn.Linear(2, 2)),
    "loss": (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1)),
    "library function": (nn.functional.mse_loss, nn.functional.l1_loss),
    "compiled": (operator.itemgetter(0), operator.itemgetter(1)),
    "method of a value": ("a".upper, "b".upper),
    "pattern": (re.compile("a"), re.compile("b")),
    "data set": (TensorDataset(X), TensorDataset(X + 1)),
    "loader": (DataLoader(TensorDataset(X), batch_size=1), DataLoader(TensorDataset(X), batch_size=2)),
    "shuffled": (DataLoader(TensorDataset(X)), DataLoader(TensorDataset(X), shuffle=True)),
    "transform": (Squares(3, functools.partial(max, 1)), Squares(3, functools.partial(max, 2))),
}


@pytest.mark.parametrize("what", PAIRS)
def test_what_differs_has_another_digest(what):
    one, other = PAIRS[what]
    assert digest(one) == digest(one) != digest(other) == digest(other)


def test_equal_values_are_equal_whoever_holds_them():
    assert digest([X, X]) == digest([X, X.clone()])
    assert digest(above(0.1)) == digest(above(0.1))
    assert digest(Told(1, "a cache")) == digest(Told(1, "another"))
    assert digest({"a", "b", "c"}) == digest({"c", "b", "a"})
    assert digest(X.T.T) == digest(X)
    for make in (lambda: Settings(a=1), lambda: Noisy([1.0]), lambda: Letters("abc"), lambda: Point(1, "a")):
        assert Identity(make()).unknown == [] and digest(make()) == digest(make())


def test_a_value_that_holds_itself():
    one, other = [1], [1]
    one.append(one)
    other.append(other)
    assert digest(one) == digest(other) != digest([1, [1]])


def recursive(n):
    return 1 if n == 0 else n * recursive(n - 1)


def test_a_function_that_calls_itself():
    assert digest(recursive) == digest(recursive)


def test_random_states_and_positions_do_not_count():
    loader = DataLoader(TensorDataset(X), shuffle=True, generator=torch.Generator().manual_seed(0))
    before = digest(loader)
    assert len(list(loader)) == 2
    assert digest(loader) == before
    for make in (random.Random, np.random.default_rng, np.random.RandomState):
        assert digest(make(0)) == digest(make(1))


def test_global_variables_are_told_apart_from_code():
    one, other = (compiled("def score(o, l): return o * weight", weight=weight) for weight in (1, 2))
    assert digest(one) == digest(other)
    assert Identity(one).surroundings != Identity(other).surroundings
    assert Identity(above(1)).surroundings == ""


def test_what_modules_hold_counts_however_it_is_reached(tmp_path, monkeypatch):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "__init__.py").write_text("from own import metrics, limits\n")
    (tmp_path / "own" / "metrics.py").write_text(
        "from own import limits\nK = 1\ndef score(o, l): return o * K * limits.K\n"
    )
    (tmp_path / "own" / "limits.py").write_text("import own\nK = 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    own = importlib.import_module("own")
    by_name, by_path = own.metrics.score, compiled("def score(o, l): return own.metrics.score(o, l)", own=own)
    seen = {(Identity(by_name).surroundings, Identity(by_path).surroundings)}
    for module, value in ((own.limits, 3), (own.metrics, 4)):
        monkeypatch.setattr(module, "K", value)
        seen.add((Identity(by_name).surroundings, Identity(by_path).surroundings))
    assert len({one for one, _ in seen}) == len({other for _, other in seen}) == 3
    before = digest(by_path)
    monkeypatch.setattr(own.metrics, "score", own.metrics.score.__get__(1))
    assert digest(by_path) != before


def test_what_cannot_be_read_is_listed(tmp_path):
    path = Path(tmp_path / "data")
    path.touch()
    with path.open() as file:
        values = {"rows": (row for row in X), "file": file}
        unknown = Identity(values).unknown
    assert unknown == [
        "['rows'] (a generator, which can be iterated only once)",
        "['file'] (a TextIOWrapper, which can be iterated only once)",
    ]
    assert Identity(threading.Lock(), X, Weighted(1)).unknown == []
    assert Identity(sys._getframe()).unknown[0].startswith("frame (frame: cannot pickle")


def test_digests_are_the_same_in_another_process():
    code = (
        "import torch; from halfstep.identity import Identity; from torch import nn\n"
        'score = eval(\'lambda o, l: o in {"a", "b", "c", "d"}\')\n'
        "print(Identity(score, nn.functional.cross_entropy, torch.relu, {'x', 'y', 'z'}, nn.ReLU()).digest)"
    )
    told = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(told) == 1 and len(told.pop().strip()) == 32


@pytest.mark.parametrize("value", [X, X.numpy(), X.to(torch.bfloat16), X > 1, torch.zeros(2, 0), X[:, 0]])
def test_bytes_by_row(value):
    rows = rows_of_bytes(value)
    assert rows.dtype == np.uint8 and len(rows) == 2
    assert rows.size == (
        value.nbytes if isinstance(value, np.ndarray) else value.numel() * value.element_size()
    )
