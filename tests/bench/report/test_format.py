"""Tests the format of numbers."""

import pytest

from bench.report.format import duration, factor, percent, shape_name


@pytest.mark.parametrize(
    ("value_ms", "text"),
    [(0.00123, "0.0012 ms"), (0.123456, "0.123 ms"), (1.2345, "1.23 ms"), (1234.5, "1,234 ms"), (61573.0, "61.6 s")],
)
def test_a_time_has_three_digits_or_so(value_ms: float, text: str) -> None:
    assert duration(value_ms) == text


def test_a_small_percentage_keeps_a_decimal() -> None:
    assert [percent(54.6), percent(0.24)] == ["55 %", "0.2 %"]


def test_a_small_factor_keeps_a_decimal() -> None:
    assert [factor(1500.4), factor(16.2), factor(1.46)] == ["1,500", "16", "1.5"]


def test_a_shape_reads_as_a_product() -> None:
    assert shape_name((8, 64)) == "8×64"
