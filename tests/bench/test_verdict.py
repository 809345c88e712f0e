"""The sentence at the top: what it claims, and when it claims less."""

from bench.verdict import headline_shape, noise_floor, paired_variants, rounds_ms, sentence, worst_error


def row_of(results: dict, label: str, T: int) -> dict:
    """One row."""
    return next(row for row in results["rows"] if (row["label"], row["T"]) == (label, T))


def test_the_headline_is_the_largest_shape(results: dict) -> None:
    assert headline_shape(results) == (1, 64)


def test_it_names_the_fastest_and_its_share_of_the_limit(results: dict) -> None:
    text = sentence(results)
    assert "At 1×64 fast O3 is fastest with 4.04 ms (next: eager, 16.0 ms)" in text
    assert "4 times as fast as eager and at 25 % of what 2 cores" in text
    assert "All 3 agree" in text


def test_it_tells_what_optimisation_brought(results: dict) -> None:
    assert "makes fast 100 times as fast: 404 ms at O0, 4.04 ms at O3" in sentence(results)
    assert [pair["shape"] for pair in paired_variants(results)] == [(1, 16), (1, 64)]


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
