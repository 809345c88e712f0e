import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from itertools import chain
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gpt.checkpoint import save_checkpoint
from gpt.cli import UserError
from tvm_frontend import compile as compile_module
from tvm_frontend import cuda_toolchain
from tvm_frontend.artifact import load_compiled
from tvm_frontend.compile import compile_model
from tvm_frontend.cuda_toolchain import cubin_archs, find_compiler, gpu_arch
from tvm_frontend.kernels import PRECISIONS, Precision
from tvm_frontend.options import CompileOptions
from tvm_frontend.runtime import open_session

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model(exported, tmp_path):
    """The exported model in a folder of its own."""
    return Path(shutil.copy(exported.path, tmp_path / "model.onnx"))


@pytest.fixture
def command(in_process):
    """Run the command line in this process: exit code, stdout, stderr."""
    return partial(in_process, compile_module.main)


@pytest.fixture
def compiler():
    try:
        return find_compiler()
    except UserError as error:
        pytest.skip(str(error))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
def test_the_command_writes_an_artifact_and_the_ir_of_each_phase_and_says_where_time_went(model, command):
    code, out, err = command(model, "--dump-ir", model.parent / "ir", "--print-pass-times")
    assert (code, err) == (0, "")
    assert names(model.parent) == ["ir", "model.onnx", "tvm-llvm-O3"]
    assert names(model.parent / "tvm-llvm-O3") == ["library.so", "model.json", "weights.bin"]
    compiled = load_compiled(model.parent / "tvm-llvm-O3")
    assert (sum(compiled.kernels.values()), compiled.kernels["causal_attention"]) == (17, 2)  # 7 a layer, and 3
    phases = compiled.pipeline
    dumped = names(model.parent / "ir")
    assert [name[3:].split(".")[0] for name in dumped] == phases
    assert [name[:2] for name in dumped] == [f"{number:02d}" for number in range(1, len(phases) + 1)]
    texts = {name[3:].split(".")[0]: (model.parent / "ir" / name).read_text() for name in dumped}
    assert "R.nn.attention" in texts["import"]
    assert "R.nn.attention" not in texts["fuse_attention"]
    assert "causal_attention" in texts["fuse_attention"]
    assert "target triple" in texts["machine_code"]
    for phase in phases:
        assert re.search(rf"^ +\d+\.\d{{3}} s  {phase}$", out, re.MULTILINE), phase
    assert "VMShapeLower: " in out  # one of TVM's own
    assert re.search(r"^wrote \S+tvm-llvm-O3 \(\d+\.\d MB, llvm \S+, opt level 3, \d+\.\d s\)$", out, re.MULTILINE)


def test_the_command_line_offers_every_precision_of_a_target():
    assert get_args(Precision) == tuple(dict.fromkeys(chain.from_iterable(PRECISIONS.values())))


@pytest.mark.slow
def test_the_command_works_as_a_process_of_its_own(model):
    done = subprocess.run(
        [sys.executable, "-m", "tvm_frontend.compile", "model.onnx", "-o", "out", "--opt-level", "0"],
        cwd=model.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    checked, wrote = done.stdout.splitlines()
    assert checked.startswith("checked at 2x11: differs from the file it was compiled from by at most ")
    assert wrote.startswith("wrote out (")
    assert "arning" not in done.stderr
    assert load_compiled(model.parent / "out").opt_level == 0


@pytest.mark.slow
def test_for_another_cpu_only_its_own_instructions_are_used(model, checkpoint, eager):
    compiled = compile_model(model, options=CompileOptions(mcpu="x86-64"))
    assert compiled.target["mcpu"] == "x86-64"
    disassembled = subprocess.check_output(["objdump", "-d", compiled.path / "library.so"], text=True)
    assert "xmm" in disassembled
    assert "ymm" not in disassembled
    ids = np.random.default_rng(0).integers(0, 211, (2, 64))
    np.testing.assert_allclose(open_session(compiled).prefill(ids), eager(checkpoint, ids), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none.onnx"], "none.onnx: no such file; make one with: python -m gpt.train, then python -m export.onnx"),
        (["--target", "tpu"], "target 'tpu': not known; known are llvm, cuda"),
        (["--target", "sm_90"], "target 'sm_90': say --target cuda --arch sm_90"),
        (["--target", "llvm -mcpu=znver4"], "target 'llvm -mcpu=znver4': say --target llvm --mcpu znver4"),
        (["--target", "cuda -arch=sm_80"], "target 'cuda -arch=sm_80': say --target cuda --arch sm_80"),
        (["--target", "gpu"], "target 'gpu': say --target cuda"),
        (["--target", "cuda", "--arch", "sm_50"], "arch 'sm_50': not known.*sm_86"),
        (["--target", "cuda", "--arch", "sm_75"], "arch 'sm_75': the kernels of bf16 need sm_80 or later"),
        (
            ["--target", "cuda", "--arch", "sm_86,sm_75", "--precision", "tf32"],
            "arch 'sm_75': the kernels of tf32 need",
        ),
        (["--arch", "sm_86"], "say --target cuda"),
        (["--mcpu", "skylark"], "mcpu 'skylark': not known to LLVM.*near: skylake"),
        (["-o", "full"], "full: exists and is no compiled model, so it is not replaced"),
        (["-o", "model.onnx"], "model.onnx: exists and is no compiled model"),
        (["-o", "model.onnx/out"], "cannot write model.onnx/out"),
        (["--dump-ir", "model.onnx/ir"], "cannot write model.onnx/ir"),
    ],
)
def test_a_users_mistake_is_one_line_and_leaves_nothing(model, command, monkeypatch, arguments, said):
    monkeypatch.chdir(model.parent)
    (model.parent / "full").mkdir()
    (model.parent / "full" / "model.json").write_text("{}")
    (model.parent / "full" / "thesis.tex").write_text("years of work")
    code, out, err = command(*arguments, *([] if "none.onnx" in arguments else ["model.onnx"]))
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"error: [^\n]*{said}[^\n]*\n", err), err
    assert names(model.parent) == ["full", "model.onnx"]
    assert (model.parent / "full" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("name", "checkpoint", "commands"),
    [
        ("artifacts/model.onnx", False, "python -m gpt.train, then python -m export.onnx"),
        ("artifacts/model.onnx", True, "python -m export.onnx"),
        ("artifacts/model-cache.onnx", True, "python -m export.onnx --with-cache"),
        ("my.onnx", True, "python -m export.onnx -o my.onnx"),
    ],
)
def test_without_an_export_the_commands_that_lead_there_are_named(
    command, monkeypatch, tmp_path, name, checkpoint, commands
):
    monkeypatch.chdir(tmp_path)
    if checkpoint:
        (tmp_path / "artifacts").mkdir()
        (tmp_path / "artifacts" / "ckpt.pt").touch()
    expected = 2, "", f"error: {name}: no such file; make one with: {commands}\n"
    assert command(name) == expected
    if name == "artifacts/model.onnx":
        assert command() == expected  # where it looks if it is not told


def test_a_checkpoint_is_named_as_one(command, checkpoint, tmp_path):
    path = tmp_path / "ckpt.pt"
    save_checkpoint(path, checkpoint)
    code, out, err = command(path)
    said = f"not an ONNX file but a checkpoint; export it first with: python -m export.onnx {path}"
    assert (code, out, err) == (2, "", f"error: {path}: {said}\n")


def test_another_opt_level_is_refused(model, command):
    code, _, err = command(model, "--opt-level", "1")
    assert code == 2
    assert "--opt-level" in err
    with pytest.raises(UserError, match=r"opt level 1: must be 0 \(TVM's own untuned pipeline\) or 3"):
        compile_model(model, options=CompileOptions(opt_level=1))
    assert names(model.parent) == ["model.onnx"]


def test_a_damaged_export_is_refused(model):
    proto = onnx.load(model)
    proto.graph.initializer[0].raw_data = bytes(len(proto.graph.initializer[0].raw_data))
    onnx.save(proto, model)
    with pytest.raises(UserError, match="does not match its own hash"):
        compile_model(model)
    assert names(model.parent) == ["model.onnx"]


def test_a_file_with_a_node_that_is_not_supported_is_refused_before_anything_is_compiled(model):
    proto = onnx.load(model)
    node = next(node for node in proto.graph.node if node.op_type == "Gelu")
    node.op_type = "Celu"
    del node.attribute[:]
    proto.ClearField("metadata_props")  # by which a file of ours is known to be edited
    onnx.save(proto, model)
    said = rf"^node '{node.name}': operator Celu of domain ai\.onnx \(opset 23\) is not supported"
    with pytest.raises(UserError, match=said):
        compile_model(model)
    assert names(model.parent) == ["model.onnx"]


def test_without_a_cpp_compiler_the_user_is_told_what_to_install(model, monkeypatch):
    for name, value in (("PATH", ""), ("CC", ""), ("CXX", "")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"no C\+\+ compiler on PATH.*install g\+\+"):
        compile_model(model)
    assert names(model.parent) == ["model.onnx"]


@pytest.mark.slow
def test_a_damaged_artifact_or_an_empty_folder_is_replaced(model):
    output = model.parent / "out"
    output.mkdir()
    (output / "model.json").write_text("damaged")
    assert compile_model(model, output, CompileOptions(opt_level=0)) == load_compiled(output)


@pytest.mark.slow
def test_an_earlier_artifact_survives_a_failed_compilation(model, compiled, monkeypatch):
    output = Path(shutil.copytree(compiled.path, model.parent / "tvm-llvm-O3"))

    def fail(folder, *_):
        (folder / "library.so").write_text("half")
        raise RuntimeError("no space")

    monkeypatch.setattr(compile_module, "save_compiled", fail)
    with pytest.raises(RuntimeError, match="no space"):
        compile_model(model)
    assert names(model.parent) == ["model.onnx", "tvm-llvm-O3"]
    assert load_compiled(output).files_crc32 == compiled.files_crc32


@pytest.mark.slow
@pytest.mark.parametrize("exception", [KeyboardInterrupt, UserError])
def test_what_a_rewrite_raises_reaches_the_caller_through_tvm(model, monkeypatch, exception):
    def fail(*_):
        raise exception("stop")

    monkeypatch.setattr("tvm_frontend.kernels.cpu.formats.GemmFormat.pack", fail)
    with pytest.raises(exception):
        compile_model(model)
    assert names(model.parent) == ["model.onnx"]


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["fuse_linear", "machine_code"])
def test_ctrl_c_half_way_leaves_nothing(model, phase, interrupt):
    """On a busy machine the signal may come too late, and the run is whole: then it is tried again."""

    def has_begun():
        assert len(names(model.parent)) > 1  # the half-written one and its lock are there, or the whole one already

    for _ in range(10):
        code, out, err = interrupt(
            phase.encode(), "tvm_frontend.compile", "model.onnx", folder=model.parent, check=has_begun
        )
        if code != 0:
            break
        shutil.rmtree(model.parent / "tvm-llvm-O3")
    assert code == 130
    assert out == b""
    assert err.splitlines()[-1].split(b"\r")[-1].strip() == b"interrupted: nothing half-written was left behind"
    assert b"Traceback" not in err
    assert names(model.parent) == ["model.onnx"]


@pytest.mark.slow
def test_cuda_is_compiled_to_machine_code_of_the_arch_without_a_gpu(compiler, model, command):
    code, out, err = command(model, "--target", "cuda")
    assert (code, err) == (0, "")
    assert re.search(r"^wrote \S+tvm-sm_86-O3 \(\d+\.\d MB, cuda sm_86, opt level 3, ", out, re.MULTILINE)
    output = model.parent / "tvm-sm_86-O3"
    compiled = load_compiled(output)
    assert cubin_archs(compiled.library("sm_86").read_bytes()) == {"sm_86"}
    assert compiled.target["archs"] == ["sm_86"]
    assert json.loads((output / "model.json").read_text())["target"]["kind"] == "cuda"


@pytest.mark.slow
def test_a_file_of_others_is_compiled_for_a_gpu_with_all_its_parts(compiler, foreign_file, tmp_path, command):
    code, out, _ = command(foreign_file(tmp_path / "theirs.onnx"), "--target", "cuda", "-o", tmp_path / "compiled")
    assert code == 0
    assert "not checked: this artifact needs a GPU" in out or "checked at" in out
    compiled = load_compiled(tmp_path / "compiled")
    assert list(compiled.parts) == ["", "plain"]
    for part in compiled.parts:
        assert cubin_archs(compiled.library("sm_86", part).read_bytes()) == {"sm_86"}


@pytest.mark.slow
def test_one_artifact_has_the_machine_code_of_several_archs(compiler, model, command):
    code, out, err = command(model, "--target", "cuda", "--arch", "sm_80,sm_86", "--fast-math", "--opt-level", "0")
    assert (code, err) == (0, "")
    assert re.search(r"^wrote \S+tvm-sm_80-sm_86-O0-fast-math \(\d+\.\d MB, cuda sm_80, sm_86, ", out, re.MULTILINE)
    compiled = load_compiled(model.parent / "tvm-sm_80-sm_86-O0-fast-math")
    assert [cubin_archs(library.read_bytes()) for library in compiled.libraries] == [{"sm_80"}, {"sm_86"}]
    assert command(model, "--target", "cuda", "--arch", "sm_80,sm_86", "--fast-math", "--opt-level", "0")[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"precision": "fp32"}, {"opt_level": 0}])
def test_an_older_gpu_has_code_by_tvms_own_rules(compiler, model, how):
    compiled = compile_model(model, options=CompileOptions(target="cuda", arch="sm_75", **how))
    assert cubin_archs(compiled.library("sm_75").read_bytes()) == {"sm_75"}


@pytest.mark.slow
def test_fast_math_is_for_gpus(model, command):
    code, _, err = command(model, "--fast-math")
    assert (code, err) == (2, "error: --fast-math is for --target cuda: leave it out\n")


@pytest.mark.slow
def test_where_no_gpu_is_its_artifact_is_refused(compiler, model, monkeypatch):
    monkeypatch.setattr(cuda_toolchain, "gpu_arch", lambda: None)
    compiled = compile_model(model, options=CompileOptions(target="cuda", opt_level=0))
    with pytest.raises(UserError, match="needs a GPU that runs sm_86, and this machine shows none"):
        open_session(compiled)


@pytest.mark.slow
@pytest.mark.skipif(gpu_arch() is None, reason="no NVIDIA driver with a GPU on this machine")
def test_on_a_gpu_it_computes_what_eager_does(compiler, model, checkpoint, eager):
    session = open_session(compile_model(model, options=CompileOptions(target="cuda", arch=gpu_arch())))
    for B, T in [(1, 1), (3, 17), (2, 70)]:
        ids = np.random.default_rng(0).integers(0, 211, (B, T))
        np.testing.assert_allclose(session.prefill(ids), eager(checkpoint, ids), rtol=0, atol=1e-4)


def test_without_a_cuda_compiler_the_user_is_told_what_to_install(model, command, monkeypatch):
    monkeypatch.setattr(cuda_toolchain, "_nvcc_candidates", list)
    monkeypatch.setattr(cuda_toolchain, "_nvrtc_candidates", list)
    code, out, err = command(model, "--target", "cuda")
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: target cuda needs a CUDA compiler, [^\n]*pip install nvidia-cuda-nvrtc[^\n]*\n", err)
    assert names(model.parent) == ["model.onnx"]


@pytest.mark.parametrize("opt_level", [0, 3])
def test_running_sums_of_an_input_compile(tmp_path: Path, opt_level: int) -> None:
    """OPT and BLOOM count the tokens that a mask shows, by an operator that TVM lowers in a pass of its own."""
    mask = helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["B", "T"])
    rows = helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["B", "T", 3])
    table = np.arange(15, dtype=np.float32).reshape(5, 3)
    held = [numpy_helper.from_array(np.array(1), "axis"), numpy_helper.from_array(table, "table")]
    nodes = [
        helper.make_node("CumSum", ["attention_mask", "axis"], ["sums"]),
        helper.make_node("Gather", ["table", "sums"], ["rows"]),
    ]
    graph = helper.make_graph(nodes, "counts", [mask], [rows], held)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "m.onnx")
    session = open_session(compile_model(tmp_path / "m.onnx", options=CompileOptions(opt_level=opt_level)))
    given = np.array([[1, 0, 1, 1], [0, 0, 1, 1]])
    assert session.run({"attention_mask": given})["rows"].tolist() == table[given.cumsum(1)].tolist()


def test_positions_behind_a_past_are_multiplied_in_a_kernel_of_their_own(tmp_path: Path) -> None:
    """Rotary positions are floats that begin at the length of the past and are as many as the new tokens."""
    inputs = [
        helper.make_tensor_value_info("new", TensorProto.FLOAT, ["T"]),
        helper.make_tensor_value_info("old", TensorProto.FLOAT, ["P"]),
    ]
    angles = helper.make_tensor_value_info("angles", TensorProto.FLOAT, ["T", 3])
    rates = np.array([1.0, 0.5, 0.25], np.float32)
    held = {"one": np.array(1), "first": np.array([0]), "last axis": np.array([1]), "rates": rates}
    nodes = [
        helper.make_node("Shape", ["old"], ["P list"]),
        helper.make_node("Squeeze", ["P list", "first"], ["P"]),
        helper.make_node("Shape", ["new"], ["T list"]),
        helper.make_node("Squeeze", ["T list", "first"], ["T"]),
        helper.make_node("Add", ["P", "T"], ["end"]),
        helper.make_node("Range", ["P", "end", "one"], ["positions"]),
        helper.make_node("Cast", ["positions"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["floats", "last axis"], ["column"]),
        helper.make_node("Mul", ["column", "rates"], ["angles"]),
    ]
    weights = [numpy_helper.from_array(array, name) for name, array in held.items()]
    graph = helper.make_graph(nodes, "angles", inputs, [angles], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "m.onnx")
    session = open_session(compile_model(tmp_path / "m.onnx"))
    found = session.run({"new": np.zeros(2, np.float32), "old": np.zeros(5, np.float32)})["angles"]
    assert found.tolist() == (np.array([[5.0], [6.0]], np.float32) * rates).tolist()
