from collections.abc import Callable

import pytest

from bench.gpu.cases import Case, cases_of


@pytest.mark.parametrize("case", cases_of("sampling::the_likeliest_is_written_where_it_belongs"), ids=str)
def test_the_likeliest_is_written_where_it_belongs(check: Callable[[Case], None], case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", cases_of("sampling::of_equal_logits_the_first_is_taken"), ids=str)
def test_of_equal_logits_the_first_is_taken(check: Callable[[Case], None], case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", cases_of("sampling::behind_the_last_place_nothing_is_written"), ids=str)
def test_behind_the_last_place_nothing_is_written(check: Callable[[Case], None], case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", cases_of("sampling::draws_follow_the_softmax_of_the_likeliest"), ids=str)
def test_draws_follow_the_softmax_of_the_likeliest(check: Callable[[Case], None], case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", cases_of("sampling::a_token_without_a_chance_is_never_drawn"), ids=str)
def test_a_token_without_a_chance_is_never_drawn(check: Callable[[Case], None], case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", cases_of("sampling::draws_differ_by_seed_place_and_sequence"), ids=str)
def test_draws_differ_by_seed_place_and_sequence(check: Callable[[Case], None], case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", cases_of("sampling::at_temperature_0_the_likeliest_is_taken"), ids=str)
def test_at_temperature_0_the_likeliest_is_taken(check: Callable[[Case], None], case: Case) -> None:
    check(case)
