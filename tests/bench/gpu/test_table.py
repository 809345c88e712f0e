"""The table of races that lie in a folder."""

import json
import re
from pathlib import Path

import pytest

from bench.gpu.table import write_table
from gpt.cli import UserError

ROW = {
    "engine": "eager", "label": "eager", "phase": "decode", "work": "context 1000", "precision": "bf16",
    "status": "timed", "reason": None, "median_ms": 0.5, "spread": 0.02, "limit_ms": 0.1, "percent_of_limit": 20.0,
    "limit_binds": "reading", "speedup": {"median": 1.0}, "max_rel_err": 3e-3,
}  # fmt: skip
OURS = ROW | {"engine": "tvm", "label": "tvm O3", "median_ms": 0.125, "percent_of_limit": 80.0, "speedup": None}
GONE = ROW | {"label": "gone", "status": "absent", "reason": "not installed", "median_ms": None}
RACE = {
    "model": "gpt2", "parameters": 123_532_032, "created": "2030-01-01 00:00 UTC", "command": "python -m bench.gpu",
    "seed": 7, "rows": [ROW, OURS, GONE], "notes": {"sdpa": {"attention": "flash"}}, "versions": {"torch": "2"},
    "device": {"name": "A GPU", "arch": "sm_90", "multiprocessors": 132, "memory_bytes": 2**37, "host": "A CPU"},
    "limits": {"bf16": {"precision": "bf16", "peak_flops_per_s": 7.9e14, "memory_bytes_per_s": 4.3e12}},
}  # fmt: skip
CASE = {"name": "test_linear::test_rows[1-on_gpu]", "status": "agrees", "reason": None, "error_of_tolerance": 0.31}


def test_the_table_has_every_row_the_fastest_first_and_why_others_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "gpt2.json").write_text(json.dumps(RACE))
    failed = CASE | {"status": "disagrees", "reason": "assert False", "name": "test_rows::test_embedding[1-on_gpu]"}
    kernels = {"cases": [CASE, failed], "reason": None, "where": "on the GPU"}
    (tmp_path / "kernels.json").write_text(json.dumps(kernels))
    finding = {"tool": "racecheck", "status": "clean", "said": "0 hazards", "seconds": 41.7}
    (tmp_path / "sanitizer.json").write_text(json.dumps([finding]))
    text = write_table(tmp_path).read_text()
    lines = [re.sub(" +", " ", line) for line in text.splitlines()]
    first = lines.index("| tvm O3 | bf16 | 0.125 | 2.0 % | 0.100 | 80 % | reading | – | 3.0e-03 |")
    assert lines[first + 1] == "| eager | bf16 | 0.500 | 2.0 % | 0.100 | 20 % | reading | 1.00 | 3.0e-03 |"
    assert "- gone: absent: not installed" in lines
    assert "**context 1000**: tvm O3 runs at 4.00 times the speed of eager" in lines
    assert "## gpt2, 124 million parameters" in lines
    assert "A GPU (sm_90, 132 multiprocessors, 128 GiB, host A CPU)" in text
    assert "a copy at 4,300 GB/s" in text
    assert "- bf16: 790 TFLOP/s" in lines
    assert "1 of 2 cases agree, on the GPU." in lines
    assert "- test_rows::test_embedding[1-on_gpu]: disagrees: assert False" in lines
    assert "- test_linear::test_rows: 31 %" in lines
    assert "- racecheck: clean: 0 hazards (42 s)" in lines
    assert lines[0] == "# Measured on a GPU"


def test_a_trial_on_a_cpu_is_not_called_a_gpus(tmp_path: Path) -> None:
    on_cpu = RACE | {"device": {"name": "A CPU", "memory_bytes": 2**34, "host": "A CPU"}}
    (tmp_path / "tiny.json").write_text(json.dumps(on_cpu))
    assert write_table(tmp_path).read_text().startswith("# The measurement of a GPU, tried on a CPU\n")


def test_a_folder_without_results_says_what_makes_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no JSON files of python -m bench\.gpu there"):
        write_table(tmp_path)
