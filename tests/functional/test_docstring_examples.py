"""The examples in the docstrings of formats and functions are true."""

import doctest
import importlib
import pkgutil

import numpy
import pytest
import torch

from halfstep import formats, functional, granularity
from halfstep.export import storage

PACKAGES = (formats, functional)
MODULES = [
    f"{package.__name__}.{module.name}"
    for package in PACKAGES
    for module in pkgutil.iter_modules(package.__path__)
]


@pytest.mark.parametrize("name", [*MODULES, granularity.__name__, storage.__name__])
def test_examples(name):
    names = {"torch": torch, "np": numpy, **vars(granularity), **vars(formats), **vars(functional)}
    result = doctest.testmod(importlib.import_module(name), extraglobs=names)
    assert result.failed == 0


def test_there_are_examples():
    modules = [importlib.import_module(name) for name in MODULES]
    assert sum(len(test.examples) for m in modules for test in doctest.DocTestFinder().find(m)) > 20
