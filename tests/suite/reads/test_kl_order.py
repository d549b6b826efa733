"""The order of a direction, by power laws that are known: between rounding and saturation, and nowhere else."""

import numpy as np
import pytest

from deadbench.suite.reads.kl_order import order_of, with_orders
from deadbench.suite.reads.perturbation import STEPS

U = 2.0**-53


def told(divergence, roundoff=U):
    """The order of KL(t) where the outputs change by its root."""
    values = [divergence(step) for step in STEPS]
    return order_of(STEPS, values, [value**0.5 for value in values], roundoff)


def test_there_are_steps_enough():
    assert len(STEPS) >= 8
    assert {0.01, 0.1, 1.0} <= set(STEPS)


@pytest.mark.parametrize(("k", "verdict"), [(1, "regular"), (2, "singular"), (3, "singular")])
def test_a_power_law_has_its_order(k, verdict):
    found = told(lambda t: 1e-4 * t ** (2 * k))
    assert found.order == pytest.approx(k, abs=1e-9)
    assert found.error < 1e-9
    assert found.verdict == verdict


def test_the_next_order_and_saturation_are_left_out_of_the_fit():
    found = told(lambda t: float(np.tanh(0.2 * t**2 * (1 + t))))
    assert found.verdict == "regular"
    assert 0.99 < found.order < 1.03
    assert 0 < found.error < 0.02


def test_outputs_that_are_nearly_uniform_saturate_sooner():
    """A planted unit of a model as initialised: KL 8.3e-5 at 0.1, and 0.005 where there is nothing more to move."""
    found = told(lambda t: 0.005 * float(np.tanh(160 * t**4)))
    assert found.verdict == "singular"
    assert found.order == pytest.approx(2, abs=0.02)


def test_what_stays_at_rounding_is_a_gauge_and_what_leaves_it_late_is_unresolved():
    assert told(lambda t: 1e-30).verdict == "gauge"
    assert told(lambda t: 0.0) == (None, None, "gauge")
    assert told(lambda t: max(1e-30, 1e-27 * t**2)).verdict == "gauge"
    assert told(lambda t: max(1e-30, 1e-20 * t**4)).verdict == "unresolved"


def test_rounding_of_float32_is_told_from_a_change():
    assert told(lambda t: 1e-12, 2.0**-24).verdict == "gauge"
    assert told(lambda t: 1e-12).verdict == "unresolved", "in float64 that is a change, and of no power of the step"


@pytest.mark.parametrize("k", [0.7, 1.4])
def test_another_order_is_unresolved(k):
    assert told(lambda t: 1e-4 * t ** (2 * k)).verdict == "unresolved"


def test_each_direction_of_a_site_has_its_order_at_all_its_steps():
    rows = [
        {"direction": name, "step": t, "kl": None, "output_change": 1e-3 * t**k}
        for name, k in (("random", 1), ("planted-unit", 2))
        for t in STEPS
    ]
    found = with_orders(rows, U)
    assert {(row["direction"], row["verdict"]) for row in found} == {
        ("random", "regular"),
        ("planted-unit", "singular"),
    }
    assert {row["kl_order"] for row in found} == {1.0, 2.0}
