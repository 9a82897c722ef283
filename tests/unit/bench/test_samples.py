import numpy as np
import pytest

from headrace.base.errors import HeadraceError
from headrace.bench.samples import median, quantile, spread
from headrace.bench.subject import decode_rates

VALUES = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6]


@pytest.mark.parametrize("q", [0.0, 0.25, 0.5, 0.9, 0.99, 1.0])
def test_quantiles_are_those_of_numpy(q):
    assert quantile(VALUES, q) == pytest.approx(np.quantile(VALUES, q))


def test_the_median_of_one_value_is_it():
    assert median([7.0]) == 7.0


def test_spread_is_the_middle_half_over_the_median():
    values = [8.0, 9.0, 10.0, 11.0, 12.0]
    assert spread(values) == pytest.approx(0.2)
    assert spread([*values[:-1], 1e6]) == pytest.approx(0.2), "whatever the odd one out does"
    assert spread([5.0]) == 0.0


def test_decode_rates_leave_prefill_out():
    assert decode_rates(10, firsts=[9.0, 1.0, 1.5], wholes=[2.0, 6.0]) == (10.0, 2.0)


def test_a_run_too_short_to_measure_is_an_error_not_a_figure():
    with pytest.raises(HeadraceError, match="no longer than one of the first alone"):
        decode_rates(10, firsts=[1.0], wholes=[2.0, 1.0])
