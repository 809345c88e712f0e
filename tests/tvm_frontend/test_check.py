import importlib.util
import re
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from gpt.cli import UserError
from gpt.config import GPTConfig
from tvm_frontend import check as check_module
from tvm_frontend import compile as compile_module
from tvm_frontend.check import check_only
from tvm_frontend.compile import compile_model
from tvm_frontend.frontends import read_source, run_onnx
from tvm_frontend.kernels.cpu import CpuKernels
from tvm_frontend.kernels.cpu.formats import GemmFormat
from tvm_frontend.options import CompileOptions

CONFIG = GPTConfig(block_size=30, vocab_size=37, n_layer=1, n_head=2, n_embd=64)
CHECKED = r"checked at (\d+x\d+): differs from the file it was compiled from by at most (\S+) of .* \(tolerance (\S+)\)"


@pytest.fixture
def path(export, tmp_path):
    """Copy an export of a form into a folder of its own."""

    def copied(form="forward", config=CONFIG, **how):
        return Path(shutil.copy(export(config, form, **how)[1].path, tmp_path / "model.onnx"))

    return copied


def compile_checked(model, **how):
    """Compile, and give the one line about the check."""
    said = []
    compile_model(model, options=CompileOptions(check=True, **how), say=said.append)
    (line,) = said
    assert "\n" not in line
    return line


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "how"),
    [
        ("forward", {"opt_level": 0}),
        ("cached", {}),
        ("cached", {"precision": "bf16"}),
        ("forward", {"precision": "int8"}),
        ("cached", {"precision": "int4"}),
    ],
    ids=str,
)
def test_what_is_right_is_well_within_the_tolerance(path, form, how):
    shape, error, tolerance = re.fullmatch(CHECKED, compile_checked(path(form), **how)).groups()
    assert shape == "2x11"
    assert 0 < float(error) < float(tolerance) / 2


@pytest.mark.slow
@pytest.mark.parametrize("form", ["forward", "cached"])
def test_a_file_that_gives_the_last_position_alone_is_checked_there(path, form):
    assert re.fullmatch(CHECKED, compile_checked(path(form, last=True), opt_level=0))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["forward", "cached"])
def test_a_model_of_one_position_is_checked_at_it(path, form):
    config = GPTConfig(block_size=1, vocab_size=5, n_layer=1, n_head=1, n_embd=8)
    assert re.fullmatch(CHECKED, compile_checked(path(form, config), opt_level=0)).group(1) == "2x1"


@pytest.mark.slow
def test_other_importers_are_checked_too(path, export):
    model = path(opset=18)
    assert "checked at 1x7" in compile_checked(model, frontend="relax-onnx", fixed_shape=(1, 7), opt_level=0)
    checkpoint = export(CONFIG)[1].path.with_name("ckpt.pt")
    said = []
    options = CompileOptions(check=True, frontend="torch", opt_level=0)
    compiled = compile_model(checkpoint, model.with_name("of-torch"), options, say=said.append)
    assert re.fullmatch(CHECKED, said[0])
    assert re.fullmatch(CHECKED, check_only(compiled.path, checkpoint))


def scaled(kernel, factor):
    """Make the attention of all heads too sharp or too flat."""
    return lambda self, nh, hs, *rest: kernel(self, nh, hs, *rest[:-1], rest[-1] * factor)


FAULTS = {
    "attention": lambda patch: patch(CpuKernels, "causal_attention", scaled(CpuKernels.causal_attention, 1.01)),
    "cache": lambda patch: patch(CpuKernels, "cached_attention", scaled(CpuKernels.cached_attention, 1.01)),
    "weights": lambda patch: patch(GemmFormat, "pack", lambda self, weight, *rest: PACK(self, -weight, *rest)),
    "NaN": lambda patch: patch(GemmFormat, "pack", lambda self, weight, *rest: PACK(self, weight * np.nan, *rest)),
}
PACK = GemmFormat.pack


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "form", "precision"),
    [
        ("attention", "forward", "fp32"),
        ("cache", "cached", "fp32"),
        ("NaN", "forward", "fp32"),
        *(("weights", "cached", precision) for precision in ("bf16", "int8", "int4")),
    ],
)
def test_what_is_wrong_never_gets_its_name(path, monkeypatch, fault, form, precision):
    model = path(form)
    FAULTS[fault](monkeypatch.setattr)
    with pytest.raises(RuntimeError, match=r"^the compiled model is wrong, and was not kept: checked at 2x11: "):
        compile_checked(model, precision=precision)
    assert names(model.parent) == ["model.onnx"]


@pytest.fixture
def command(in_process):
    """Run the command line in this process: exit code, stdout, stderr."""
    return partial(in_process, compile_module.main)


@pytest.mark.slow
def test_the_command_checks_unless_it_is_told_not_to(path, command, monkeypatch):
    model = path()
    code, out, _ = command(model, "--opt-level", 0)
    assert code == 0
    assert re.fullmatch(rf"{CHECKED}\nwrote .*\n", out)
    folder = model.with_name("tvm-llvm-O0")
    assert re.fullmatch(rf"{CHECKED}\n", command(model, "-o", folder, "--only-check")[1])
    monkeypatch.setattr(check_module, "check_compiled", lambda *_: pytest.fail("it was checked"))
    code, out, _ = command(model, "--opt-level", 0, "--no-check")
    assert (code, len(out.splitlines())) == (0, 1)


@pytest.mark.slow
def test_code_for_another_machine_is_not_checked_and_one_line_says_how(path, command, monkeypatch):
    model = path()
    monkeypatch.setattr("tvm_frontend.target._host_features", lambda: frozenset())
    code, out, err = command(model, "--opt-level", 0, "--mcpu", "x86-64")
    folder = model.with_name("tvm-llvm-O0")
    assert code == 0, err
    said, _ = out.splitlines()
    assert said.startswith("not checked: this artifact was compiled for the CPU x86-64, and this machine's (")
    assert said.endswith(f": python -m tvm_frontend.compile {model} -o {folder} --only-check")
    monkeypatch.undo()
    assert re.fullmatch(CHECKED, check_only(folder, model))


@pytest.mark.slow
def test_an_artifact_of_another_file_is_refused(path, compiled, command):
    model = path()
    with pytest.raises(UserError, match=r"tvm-llvm-O3: was compiled from another file than .*model\.onnx; make it"):
        check_only(compiled.path, model)
    code, out, err = command(model, "--only-check")
    assert (code, out, err) == (2, "", "error: --only-check: name the artifact to check with -o\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "how", "tolerance"),
    [("forward", {}, 1e-5), ("cached", {}, 1e-5), ("cached", {"precision": "bf16"}, 20 * 2.0**-8)],
    ids=str,
)
def test_without_onnx_runtime_onnxs_own_evaluator_is_the_reference(export, monkeypatch, form, how, tolerance):
    exported = export(CONFIG, form, **how)[1]
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 11))
    expected = run_onnx(exported, ids)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find_spec(name))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # importing it fails
    np.testing.assert_allclose(run_onnx(exported, ids), expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_file_of_fewer_bits_is_its_own_reference(export, tmp_path, precision):
    exported = export(CONFIG, "cached", precision=precision)[1]
    model = Path(shutil.copy(exported.path, tmp_path / "model.onnx"))
    assert re.fullmatch(CHECKED, compile_checked(model, opt_level=0))


def test_the_reference_of_each_frontend_is_the_same(export):
    exported = export(CONFIG)[1]
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 11))
    sources = {"onnx": exported.path, "relax-onnx": exported.path, "torch": exported.path.with_name("ckpt.pt")}
    found = [read_source(frontend, file).run(ids) for frontend, file in sources.items()]
    np.testing.assert_allclose(found[1:], found[:1] * 2, rtol=0, atol=1e-5)
