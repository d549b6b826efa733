import pytest

from deadbench.analysis.student import cumulative, widening


@pytest.mark.parametrize(
    ("degrees", "t"), [(1, 6.313752), (2, 2.919986), (3, 2.353363), (5, 2.015048), (10, 1.812461), (30, 1.697261)]
)
def test_the_distribution_is_that_of_the_tables(degrees, t):
    assert cumulative(t, degrees) == pytest.approx(0.95, abs=1e-6)


def test_few_degrees_widen_and_many_do_not():
    assert [widening(n) for n in (1, 2, 9)] == pytest.approx([6.98387, 2.26327, 1.15990], abs=1e-4)
    assert [cumulative(2 * widening(n), n) for n in (1, 4, 50)] == pytest.approx([0.97725] * 3, abs=1e-5)
    assert widening(10_000) == 1.0
    with pytest.raises(ValueError, match="needs a degree of freedom"):
        widening(0)
