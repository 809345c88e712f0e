"""Statistics of samples that are known."""

import pytest

from bench.harness.measure import Measurement, Ratio, median_of, rotated, round_medians, speedup_of, spread_of


def measurement(*rounds: tuple[float, ...]) -> Measurement:
    """Samples by round, of no engine in particular."""
    return Measurement("engine", "", "prefill", "fp32", 1, 1, 0, rounds)


def test_the_median_is_of_all_samples() -> None:
    assert median_of(measurement((1.0, 2.0), (9.0,))) == 2.0


def test_round_medians_leave_a_gap_for_a_round_without_samples() -> None:
    assert round_medians(measurement((1.0, 3.0), (), (5.0,))) == [2.0, None, 5.0]


def test_the_spread_is_of_an_engine_against_itself() -> None:
    assert spread_of(measurement((1.0, 1.0, 50.0), (1.25,))) == pytest.approx(0.25)


def test_one_round_has_no_spread() -> None:
    assert spread_of(measurement((1.0, 2.0), ())) is None


def test_a_speedup_is_taken_within_each_round() -> None:
    baseline = measurement((4.0,), (40.0,), (6.0,))  # something slowed both in the second round
    assert speedup_of(measurement((2.0,), (20.0,), (2.0,)), baseline) == Ratio(2.0, 2.0, 3.0)


def test_a_speedup_leaves_out_rounds_that_one_sat_out() -> None:
    assert speedup_of(measurement((), (1.0,)), measurement((9.0,), (5.0,))) == Ratio(5.0, 5.0, 5.0)
    assert speedup_of(measurement((), (1.0,)), measurement((9.0,), ())) is None


def test_no_sample_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        measurement((), ())


def test_each_round_begins_with_the_next_engine() -> None:
    assert [rotated("abc", number)[0] for number in range(4)] == ["a", "b", "c", "a"]
    assert sorted(rotated("abc", 5)) == ["a", "b", "c"]
    assert rotated([], 3) == []
