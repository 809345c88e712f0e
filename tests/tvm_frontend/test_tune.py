import json
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from gpt.cli import UserError
from gpt.config import GPTConfig
from tvm_frontend import tune
from tvm_frontend.artifact import load_compiled
from tvm_frontend.options import CompileOptions
from tvm_frontend.runtime import open_session
from tvm_frontend.target import resolve_target
from tvm_frontend.tune import tune_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SMALL = GPTConfig(block_size=9, vocab_size=37, n_layer=1, n_head=2, n_embd=16)
BIGRAM = GPTConfig.bigram(block_size=8, vocab_size=37)


@pytest.fixture
def command(in_process):
    """Run the command line in this process: exit code, stdout, stderr."""
    return partial(in_process, tune.main)


def copied(exported, folder):
    return Path(shutil.copy(exported.path, folder / "model.onnx"))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_everything_is_searched_kept_and_taken_up_again(export, eager, command, tmp_path):
    checkpoint, exported = export(SMALL)
    model = copied(exported, tmp_path)
    asked = [model, "--batch", 2, "--tokens", 5, "--opt-level", 0, "--trials"]
    code, out, err = command(*asked, 16)
    assert code == 0, err
    checked, wrote = out.splitlines()
    assert checked.startswith("checked at 2x5: differs from the file it was compiled from by at most ")
    assert re.match(r"wrote \S+tvm-llvm-O0-tuned-2x5 \(\d+ trials in [\d.]+ s, kept in ", wrote)
    assert names(tmp_path) == ["model.onnx", "tvm-llvm-O0-tuned-2x5", "tvm-llvm-O0-tuned-2x5-search"]
    compiled = load_compiled(tmp_path / "tvm-llvm-O0-tuned-2x5")
    kept = tmp_path / "tvm-llvm-O0-tuned-2x5-search"
    assert names(kept) == ["records.json", "search.json", "workloads.json"]
    assert (compiled.fixed_shape, compiled.search["database"]) == ([2, 5], str(kept))
    records = (kept / "records.json").read_text()
    assert len(records.splitlines()) == compiled.search["trials"] >= 12
    ids = np.random.default_rng(0).integers(0, 37, (2, 5))
    session = open_session(compiled, threads=2)
    np.testing.assert_allclose(session.prefill(ids), eager(checkpoint, ids), rtol=0, atol=2e-5)
    np.testing.assert_allclose(session.last(ids), eager(checkpoint, ids)[:, -1], rtol=0, atol=2e-5)
    with pytest.raises(UserError, match=r"\[2, 4\]: this model was compiled for \[2, 5\] alone"):
        session.prefill(ids[:, :4])

    spent = compiled.search["seconds"]
    code, out, err = command(*asked, 12)  # spent already: only built
    assert code == 0, err
    assert (kept / "records.json").read_text() == records
    assert load_compiled(compiled.path).search["seconds"] == spent
    np.testing.assert_allclose(
        open_session(load_compiled(compiled.path), threads=2).prefill(ids), eager(checkpoint, ids), rtol=0, atol=2e-5
    )

    (kept / "records.json").write_text(records + records[:40])  # what a search leaves that was killed
    (kept / ".search.json.abcdefg1.part").mkdir()
    (kept / ".search.json.lock").touch()
    code, out, err = command(*asked, 12)
    assert code == 0, err
    assert (kept / "records.json").read_text() == records

    summary = json.loads((kept / "search.json").read_text())
    (kept / "search.json").write_text(json.dumps(summary | {"target": resolve_target(mcpu="x86-64").to_json()}))
    with pytest.raises(UserError, match="a search for the CPU x86-64, and this one is for"):
        tune_model(model, options=CompileOptions(opt_level=0), shape=(2, 5), trials=12)
    (kept / "search.json").write_text(json.dumps(summary))
    (kept / "records.json").write_text("damaged\n")
    with pytest.raises(UserError, match="damaged, TVM cannot read it"):
        tune_model(model, options=CompileOptions(opt_level=0), shape=(2, 5), trials=12)


def test_behind_the_rewrites_only_what_they_left_is_searched(export, eager, command, tmp_path):
    checkpoint, exported = export(BIGRAM)
    model = copied(exported, tmp_path)
    code, _, err = command(model, "--tokens", 4, "--trials", 2, "--op", "take")
    assert code == 0, err
    compiled = load_compiled(tmp_path / "tvm-llvm-O3-tuned-1x4")
    assert "fuse_linear" in compiled.pipeline
    assert compiled.search["trials"] >= 1
    ids = np.random.default_rng(0).integers(0, 37, (1, 4))
    np.testing.assert_allclose(
        open_session(compiled, threads=2).prefill(ids), eager(checkpoint, ids), rtol=0, atol=2e-5
    )
    with pytest.raises(UserError, match=r"op 'matmul': in no kernel's name; there are .*take"):
        tune_model(model, tmp_path / "out", shape=(1, 4), trials=1, ops=("matmul",))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none.onnx", "--tokens", 4], "none.onnx: no such file"),
        (["--tokens", 10], "tokens=10: must be in 1 … 9"),
        (["--tokens", 0], "tokens=0: must be in 1 … 9"),
        (["--tokens", 4, "--batch", 0], "batch=0: must be at least 1"),
        (["--tokens", 4, "--trials", 0], "trials=0: must be at least 1"),
        (["--tokens", 4], "nothing to search for: every kernel has a hand schedule; --opt-level 0 searches for all"),
        (["--tokens", 4, "-o", "full"], "full-search: exists and is of no search"),
    ],
)
def test_a_users_mistake_is_one_line_and_leaves_nothing(export, command, monkeypatch, tmp_path, arguments, said):
    copied(export(SMALL)[1], tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full-search").mkdir()
    (tmp_path / "full-search" / "thesis.tex").write_text("years of work")
    code, out, err = command(*([] if "none.onnx" in arguments else ["model.onnx"]), *arguments)
    assert (code, out) == (2, "")
    assert re.search(rf"^error: [^\n]*{said}[^\n]*\n\Z", re.sub(r"[^\n]*\r", "", err), re.MULTILINE), err
    assert names(tmp_path) == ["full-search", "model.onnx"]


def test_ctrl_c_keeps_what_was_found(export, tmp_path, interrupt):
    model = copied(export(SMALL)[1], tmp_path)
    flags = ("--tokens", "4", "--opt-level", "0", "--trials", "40", "--op", "add")
    code, out, err = interrupt(rb" [1-9]\d*/40", "tvm_frontend.tune", model, *flags, folder=tmp_path)
    assert (code, out) == (130, b"")
    assert b"Traceback" not in err
    kept = tmp_path / "tvm-llvm-O0-tuned-1x4-search"
    found = len((kept / "records.json").read_text().splitlines())
    assert found >= 1
    assert f"{kept}: {found} trials are kept".encode() in err
    assert names(tmp_path) == ["model.onnx", kept.name]
