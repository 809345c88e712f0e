"""Tests the statements at the top of the report: what they claim, and when they claim less."""

from bench.report.summary import headline_of, noise_floor, paired_variants, rounds_ms, statements, worst_error


def row_of(results: dict, label: str, T: int) -> dict:
    """Build one row of the results."""
    return next(row for row in results["rows"] if (row["label"], row["T"]) == (label, T))


def sentence(results: dict) -> str:
    """Join all statements to one text."""
    return " ".join(statements(results))


def test_the_headline_of_a_phase_is_its_largest_work(results: dict) -> None:
    assert [headline_of(results, phase) for phase in ("prefill", "decode")] == ["1×64", "context 15"]


def test_each_phase_has_its_statement(results: dict) -> None:
    prefill, decode, generate, agreement = statements(results)
    assert prefill.startswith("Prefill, 1×64: fast O3")
    assert decode.startswith("Decode, context 15: fast O3 is fastest with 0.210 ms a token (next: eager, 0.800 ms)")
    assert generate.startswith("Generate, 8 tokens after 8: fast O3")
    assert agreement.startswith("All 3 agree")


def test_it_names_the_fastest_and_its_share_of_the_limit(results: dict) -> None:
    text = sentence(results)
    assert "Prefill, 1×64: fast O3 is fastest with 4.04 ms (next: eager, 16.0 ms)" in text
    assert "4 times as fast as eager and at 25 % of the machine's limit." in text
    assert "All 3 agree" in text


def test_it_tells_what_optimisation_brought(results: dict) -> None:
    assert "makes fast 100 times as fast: 404 ms at O0, 4.04 ms at O3" in sentence(results)
    assert [pair["work"] for pair in paired_variants(results)] == ["1×16", "1×64"]


def test_engines_that_each_won_a_round_are_level(results: dict) -> None:
    row_of(results, "eager", 64)["samples_ms"] = [4.5, 4.5, 4.0]
    row_of(results, "eager", 64)["median_ms"] = 4.5
    assert "level with eager (neither won every round)" in sentence(results)


def test_an_engine_that_disagrees_is_named(results: dict) -> None:
    row_of(results, "broken", 16)["agrees"] = False
    assert "Not to be trusted: broken" in sentence(results)


def test_nothing_timed_is_said(results: dict) -> None:
    results["rows"] = [row for row in results["rows"] if row["status"] != "timed"]
    assert sentence(results).startswith("No engine could be timed")
    assert worst_error(results) is None
    assert noise_floor(results) is None


def test_rounds_come_back_from_the_flat_samples() -> None:
    assert rounds_ms({"samples_ms": [1.0, 3.0, 7.0], "samples_by_round": [2, 0, 1]}) == [2.0, 7.0]


def test_in_few_bits_it_says_what_the_engines_agree_with(results: dict) -> None:
    text = sentence(results | {"precision": "int8"})
    assert "All 3 agree with eager in float64 of weights rounded as each rounds them:" in text
