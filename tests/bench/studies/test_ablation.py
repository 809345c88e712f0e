import re

import pytest

from bench.harness import turns
from bench.studies import ablation, search
from bench.studies.ablation import PHASES, rungs
from export.onnx import export_onnx
from gpt.checkpoint import save_checkpoint, seeded_checkpoint
from gpt.config import GPTConfig

pytestmark = pytest.mark.slow


def test_each_rung_adds_what_the_one_before_left_out():
    climbing = rungs()[1 : len(PHASES) + 1]
    assert [set(rung.without) for rung in climbing] == [set(PHASES[number:]) for number in range(1, len(PHASES) + 1)]
    assert not any(rung.without for rung in rungs()[len(PHASES) :])


def test_it_prints_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(turns, "ROUND_S", 0.001)
    kept = [rungs()[0], rungs()[1], rungs()[-1]]
    monkeypatch.setattr(ablation, "rungs", lambda: kept)
    save_checkpoint(
        tmp_path / "ckpt.pt", seeded_checkpoint(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=1, n_embd=8))
    )
    export_onnx(tmp_path / "ckpt.pt", tmp_path / "model.onnx")
    ablation.ladder(tmp_path / "model.onnx", "2x5", threads=1)
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head == "| | ms | × the step before | × the first |"
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == [rung.name for rung in kept]
    assert all(re.search(r" \| \d+\.\d\d \| (\d+\.\d\d)? \| \d+\.\d \|$", row) for row in rows)


def test_a_layer_by_hand_and_untuned(monkeypatch):
    monkeypatch.setattr(turns, "ROUND_S", 0.001)
    for number, size in (("M", 3), ("K", 16), ("N", 40)):
        monkeypatch.setattr(search, number, size)
    config = search.SearchConfig(models=("linear",), threads=1)
    found = [search.linear_contestant(str(level), level, None, config, None) for level in (0, 3)]
    untuned, by_hand = (each.call().numpy() for each in found)
    assert abs(untuned - by_hand).max() < 1e-4
    assert len(turns.times_of(found)) == 2
