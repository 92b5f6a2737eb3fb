"""Every example in a docstring runs, and every public name has a docstring."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest

import torch_bilevel

MODULES = sorted(
    [torch_bilevel.__name__]
    + [module.name for module in pkgutil.walk_packages(torch_bilevel.__path__, f"{torch_bilevel.__name__}.")]
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples of {name} fail"


def test_there_are_examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    with_examples = [
        test.name for name in MODULES for test in finder.find(importlib.import_module(name)) if test.examples
    ]
    assert len(with_examples) >= 5
    assert any("minimize" in name for name in with_examples)
    assert any("BilevelProblem" in name for name in with_examples)


@pytest.mark.parametrize("name", torch_bilevel.__all__)
def test_public_names_are_documented(name):
    item = getattr(torch_bilevel, name)
    assert inspect.getdoc(item), name
