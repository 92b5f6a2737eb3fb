"""Methods by name."""

from __future__ import annotations

import pytest

import torch_bilevel as tb
from torch_bilevel.errors import ConfigError
from torch_bilevel.methods import Method, make_method, names, options_of


def test_names_are_sorted_and_every_one_makes_a_method():
    assert names() == sorted(names()) == tb.method_names()
    assert {"fsba", "lfsba", "dlcrn"} <= set(names())
    for name in names():
        assert options_of(name), name
        assert len(set(options_of(name))) == len(options_of(name)), name


@pytest.mark.parametrize("name", ["fsba", "lfsba", "dlcrn"])
def test_make_by_name_in_any_case(name):
    method = make_method(name.upper(), {"cubic_reg": 3.0})
    assert isinstance(method, Method)
    assert method.name == name
    assert method.second_order
    assert method.regularisation.cubic_reg == 3.0
    assert make_method(method) is method


def test_options_reach_the_oracle():
    assert {"penalty", "scheme", "period", "lower", "solver", "damping", "lower_tol"} <= set(options_of("lfsba"))
    assert "period" not in options_of("fsba")
    assert "penalty" not in options_of("dlcrn")
    assert {"lower", "damping", "hessian_tol"} <= set(options_of("dlcrn"))


def test_unknown_names_and_options():
    with pytest.raises(ConfigError, match="did you mean 'dlcrn'"):
        make_method("dlcr")
    with pytest.raises(ConfigError, match="did you mean 'cubic_reg'"):
        make_method("fsba", {"cubic_regg": 1.0})
    with pytest.raises(ConfigError, match="beside a method object"):
        make_method(tb.DLCRN(), {"cubic_reg": 1.0})
    with pytest.raises(ConfigError, match="is not known"):
        make_method(None)
