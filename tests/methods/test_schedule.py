"""When a lazy method makes its Hessian anew."""

from __future__ import annotations

import pytest

from torch_bilevel.errors import ConfigError
from torch_bilevel.methods import AdaptiveRefresh, FixedPeriod
from torch_bilevel.methods.schedule import Age, make_schedule


@pytest.mark.parametrize("period", [1, 3])
def test_fixed_period_counts_accepted_steps_only(period):
    schedule = FixedPeriod(period)
    assert not schedule.refreshes_on_failure
    for accepted in range(period + 2):
        for last_accepted in (True, False):
            age = Age(accepted=accepted, distance=100.0, last_step=1e-9, last_accepted=last_accepted, last_error=9.0)
            assert schedule.due(age) == (accepted >= period)


def test_adaptive_refresh_weighs_the_price():
    schedule = AdaptiveRefresh(longest=20)

    def due(error, distance, price=1.0, accepted=True, steps=3):
        return schedule.due(Age(accepted=steps, distance=distance, last_step=1.0, last_accepted=accepted,
                                last_error=error, price=price))  # fmt: skip

    # a fresh one would have left error / (1 + 2 distance), to be compared with error^(1 + price)
    assert due(0.5, 0.6)
    assert not due(0.5, 0.4)
    assert due(0.5, 1.2, price=1.0)
    assert not due(0.5, 1.2, price=2.0)
    assert not due(0.0, 100.0)  # a quadratic function: never
    assert not due(0.01, 10.0)
    assert due(0.9, 0.1)
    assert due(3.0, 1.1)
    assert not due(3.0, 0.9)
    assert due(0.1, 0.1, accepted=False)
    assert not due(2.0, 0.4, accepted=False)
    assert due(float("inf"), 0.5)
    assert due(float("nan"), 0.5)
    assert due(0.0, 1.0, steps=20)
    assert not due(9.0, 0.0, accepted=False)  # made at this very point: M has to grow
    assert not schedule.due(Age())


@pytest.mark.parametrize("longest", [0, -3, 2.5])
def test_wrong_longest(longest):
    with pytest.raises(ConfigError, match="longest: expected an int >= 1"):
        AdaptiveRefresh(longest)


def test_make_schedule():
    assert isinstance(make_schedule("adaptive"), AdaptiveRefresh)
    assert make_schedule(4).period == 4
    own = AdaptiveRefresh(longest=5)
    assert make_schedule(own) is own
    for bad in (0, -1, 2.5, "often", None):
        with pytest.raises(ConfigError, match="period: expected an int >= 1 or 'adaptive'"):
            make_schedule(bad)
