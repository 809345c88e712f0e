"""Tests the table that compares hand-written kernels with a search, on a small layer and few trials."""

import pytest

from bench.harness import turns
from bench.studies import search
from gpt.cli import UserError
from gpt.config import GPTConfig

pytestmark = pytest.mark.slow

TINY = GPTConfig(block_size=64, vocab_size=65, n_layer=1, n_head=2, n_embd=32)


@pytest.fixture(autouse=True)
def _little_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "ROUND_S", 0.01)
    monkeypatch.setattr(search, "K", 32)
    monkeypatch.setattr(search, "N", 64)
    monkeypatch.setitem(search.SEEDED, "demo", TINY)


def names_in(table: str) -> list[str]:
    """List the names of the builds, after checking the numbers of their rows."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    for _, _, ready, call, speed in rows:
        assert float(ready.removesuffix(" s")) >= 0
        assert float(call.removesuffix(" ms")) > 0
        assert float(speed) > 0
    assert rows[0][-1] == "1.0"
    return [row[1] for row in rows]


@pytest.mark.parametrize("model", ["linear", pytest.param("demo", marks=pytest.mark.long)])
def test_by_hand_and_by_a_search_that_goes_on(model: str) -> None:
    config = search.SearchConfig(models=(model,), trials=(3, 2), threads=1)
    assert names_in(search.run_search(config)) == ["untuned", "by hand", "search, 2 trials", "search, 3 trials"]


@pytest.mark.relay
def test_relay_and_its_search() -> None:
    config = search.SearchConfig(models=("relay",), trials=(2,), threads=1)
    assert names_in(search.run_search(config)) == ["untuned, Relay", "by hand", "search by Relay, 2 trials"]


def test_no_trials_are_refused() -> None:
    with pytest.raises(UserError, match="must be numbers of at least 1"):
        search.run_search(search.SearchConfig(trials=(0,)))
