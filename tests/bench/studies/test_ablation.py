import re
from pathlib import Path

import pytest

from bench.harness import turns
from bench.studies import ablation, search
from bench.studies.ablation import ADDED_PHASES, ablation_steps
from export.onnx import export_onnx
from gpt.checkpoint import save_checkpoint, seeded_checkpoint
from gpt.config import GPTConfig

pytestmark = pytest.mark.slow


def test_each_step_adds_the_next_phase() -> None:
    cumulative = ablation_steps()[1 : len(ADDED_PHASES) + 1]
    assert [set(step.without) for step in cumulative] == [
        set(ADDED_PHASES[number:]) for number in range(1, len(ADDED_PHASES) + 1)
    ]
    assert not any(step.without for step in ablation_steps()[len(ADDED_PHASES) :])


def cells_of(line: str) -> list[str]:
    """Split a line of a Markdown table into cells, without their padding."""
    return [cell.strip() for cell in line[1:-1].split("|")]


def test_it_prints_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(turns, "ROUND_S", 0.001)
    kept = [ablation_steps()[0], ablation_steps()[1], ablation_steps()[-1]]
    monkeypatch.setattr(ablation, "ablation_steps", lambda: kept)
    save_checkpoint(
        tmp_path / "ckpt.pt", seeded_checkpoint(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=1, n_embd=8))
    )
    export_onnx(tmp_path / "ckpt.pt", tmp_path / "model.onnx")
    ablation.run_ablation(tmp_path / "model.onnx", "2x5", threads=1)
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert cells_of(head) == ["", "ms", "× the step before", "× the first"]
    assert [cells_of(row)[0] for row in rows] == [step.name for step in kept]
    assert all(re.fullmatch(r"\d+\.\d\d \| (\d+\.\d\d)? \| \d+\.\d", " | ".join(cells_of(row)[1:])) for row in rows)


def test_a_layer_by_hand_and_untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "ROUND_S", 0.001)
    for number, size in (("M", 3), ("K", 16), ("N", 40)):
        monkeypatch.setattr(search, number, size)
    config = search.SearchConfig(models=("linear",), threads=1)
    found = [search.linear_build(str(level), level, None, config, None) for level in (0, 3)]
    untuned, by_hand = (each.call().numpy() for each in found)
    assert abs(untuned - by_hand).max() < 1e-4
    assert len(turns.times_of(found)) == 2
