"""Relay beside Relax: which files it takes and that what it makes of them is right; and what befalls its process."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch

from export.artifact import metadata_of, write_exported
from gpt.cli import UserError
from gpt.config import GPTConfig
from tvm_frontend import cuda_toolchain
from tvm_frontend.artifact import load_compiled
from tvm_frontend.check import check_only
from tvm_frontend.compile import compile_model
from tvm_frontend.cuda_toolchain import cubin_archs, find_compiler
from tvm_frontend.options import CompileOptions
from tvm_frontend.relay.process import RelayProcess
from tvm_frontend.relay.session import RelaySession
from tvm_frontend.runtime import open_session
from tvm_frontend.tune import tune_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TANH = GPTConfig(block_size=17, vocab_size=37, n_layer=1, n_head=2, n_embd=20)
EXACT = replace(TANH, bias=False, activation="gelu")
BIGRAM = GPTConfig.bigram(block_size=17, vocab_size=37)  # which Relay imports in no time
TOLERANCE = 2e-5  # against float64, of logits of up to 3; another mask, epsilon or GELU is off by more than 1e-4


def random_ids(B: int, T: int) -> np.ndarray:
    return np.random.default_rng([B, T]).integers(0, 37, (B, T))


def check(path: Path, expected: Callable[[np.ndarray], np.ndarray], shape: tuple[int, int], **how) -> None:
    """Compile for a shape, run and compare."""
    compiled = compile_model(path, path.with_name("out"), CompileOptions(frontend="relay", fixed_shape=shape, **how))
    ids = random_ids(*shape)
    logits = open_session(compiled, threads=2).prefill(ids)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected(ids), rtol=0, atol=TOLERANCE)


@pytest.mark.relay
@pytest.mark.parametrize(
    ("config", "how", "shape"),
    [
        (TANH, {}, (3, 17)),  # Attention and Gelu are one node each, of operators that Relay does not have
        (TANH, {"opset": 20}, (3, 1)),  # Gelu(tanh), which Relay by itself takes for the exact one
        (EXACT, {"opset": 18}, (1, 17)),
        (TANH, {"opset": 18, "exporter": "torchscript"}, (3, 17)),
    ],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_a_file_of_ours_computes_what_eager_does(export, eager, config, how, shape):
    checkpoint, exported = export(config, **how)
    check(exported.path, lambda ids: eager(checkpoint, ids), shape)


@pytest.mark.relay
@pytest.mark.parametrize(
    ("opset", "attention", "shape"),
    [(14, "sdpa", (3, 17)), (15, "explicit", (1, 17)), (16, "sdpa", (3, 8)), (17, "explicit", (1, 1))],
)
def test_an_older_opset_of_torchs_older_exporter(export, eager, tmp_path, opset, attention, shape):
    checkpoint, exported = export(TANH)
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        checkpoint.build(attention), (torch.zeros(2, 8, dtype=torch.int64),), path, dynamo=False, opset_version=opset,
        input_names=["ids"], output_names=["logits"], dynamic_axes={"ids": {0: "B", 1: "T"}},
    )  # fmt: skip
    proto = onnx.load(path)
    assert proto.opset_import[0].version == opset
    known = {name: getattr(exported, name) for name in ("config", "tokenizer", "entry_points", "dtype", "exporter")}
    metadata = metadata_of(**known, checkpoint_sha256=exported.checkpoint_sha256)
    onnx.helper.set_model_props(proto, metadata)
    write_exported(proto, path)
    check(path, lambda ids: eager(checkpoint, ids), shape)


@pytest.fixture
def bigram(export, tmp_path) -> Path:
    """A file that is compiled in a few seconds, in a folder of its own."""
    path = tmp_path / "model.onnx"
    path.write_bytes(export(BIGRAM)[1].path.read_bytes())
    return path


@pytest.fixture
def table(export) -> np.ndarray:
    """What that file looks up: [V, V]."""
    return export(BIGRAM)[0].state["table.weight"].numpy()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.relay
@pytest.mark.parametrize("opt_level", [0, 2])
def test_the_command_writes_a_model_like_any_other_and_relays_text(bigram, table, opt_level):
    arguments = ["--batch", "2", "--tokens", "5", "--opt-level", opt_level, "--mcpu", "x86-64", "--dump-ir", "ir"]
    done = subprocess.run(
        [sys.executable, "-m", "tvm_frontend.compile", "model.onnx", "--frontend", "relay", *map(str, arguments)],
        cwd=bigram.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    output = bigram.parent / f"tvm-llvm-O{opt_level}-relay-2x5"
    checked, wrote = done.stdout.splitlines()
    assert checked.startswith("checked at ")
    assert wrote.startswith(f"wrote {output.name} (")
    assert "relay: built in " in done.stderr
    assert names(bigram.parent) == ["ir", "model.onnx", output.name]
    assert names(output) == ["graph.json", "library.so", "model.json", "weights.bin"]
    compiled = load_compiled(output)
    assert (compiled.frontend, compiled.fixed_shape, compiled.opt_level) == ("relay", [2, 5], opt_level)
    assert compiled.pipeline == ["prepare", "import", "build", "export"]
    assert compiled.versions["tvm"].startswith("0.17")
    assert sum(compiled.kernels.values()) >= 1
    assert "ymm" not in subprocess.check_output(["objdump", "-d", output / "library.so"], text=True)
    assert "take(" in (bigram.parent / "ir/01-import.relay").read_text()
    assert "def @main(" in (bigram.parent / "ir/02-optimize.relay").read_text()
    session = open_session(compiled, threads=1)
    for ids in (random_ids(2, 5), random_ids(2, 5)[::-1]):
        np.testing.assert_array_equal(session.prefill(ids), table[ids])
    with pytest.raises(UserError, match=r"\[2, 4\]: this model was compiled for \[2, 5\] alone"):
        session.prefill(random_ids(2, 4))
    os.kill(session._process.pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"^Relay's process died of SIGKILL"):
        session.prefill(ids)


@pytest.mark.relay
def test_a_file_of_the_last_position_alone_gives_no_other(export, table):
    path = export(BIGRAM, opset=18, last=True)[1].path
    ids = random_ids(2, 5)
    session = open_session(compile_model(path, options=CompileOptions(frontend="relay", fixed_shape=(2, 5))), threads=1)
    np.testing.assert_array_equal(session.prefill(ids), table[ids][:, -1:])


@pytest.mark.relay
def test_threads_share_a_session_and_a_forked_process_is_refused(bigram, table):
    """Each gets the answer to its own question: the process answers one at a time, in one place."""
    options = CompileOptions(frontend="relay", fixed_shape=(2, 5), check=True)
    said: list[str] = []
    session = open_session(compile_model(bigram, options=options, say=said.append), threads=1)
    assert said == [check_only(session.model.path, bigram)]
    wrong = []

    def ask(number: int) -> None:
        ids = (random_ids(2, 5) + number) % 37
        wrong.extend(number for _ in range(50) if not np.array_equal(session.prefill(ids), table[ids]))

    threads = [Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    child = os.fork()
    if child == 0:
        try:
            session.prefill(random_ids(2, 5))
        except UserError as error:
            os._exit(42 if "forked" in str(error) else 1)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
    np.testing.assert_array_equal(session.prefill(random_ids(2, 5)), table[random_ids(2, 5)])


@pytest.mark.relay
def test_cuda_is_compiled_to_machine_code_of_the_arch_without_a_gpu(export):
    try:
        find_compiler("nvcc")
    except UserError as error:
        pytest.skip(str(error))
    path = export(BIGRAM)[1].path
    compiled = compile_model(
        path, options=CompileOptions(frontend="relay", fixed_shape=(1, 4), target="cuda", arch="sm_80")
    )
    assert compiled.path.name == "tvm-sm_80-O3-relay-1x4"
    assert cubin_archs(compiled.library("sm_80").read_bytes()) == {"sm_80"}


@pytest.mark.relay
def test_a_search_is_kept_and_taken_up_again(bigram, table, capfd):
    ids = random_ids(1, 4)
    searched, measured = [], []
    for _ in range(2):
        compiled = tune_model(bigram, options=CompileOptions(frontend="relay"), shape=(1, 4), trials=1)
        np.testing.assert_array_equal(open_session(compiled, threads=1).prefill(ids), table[ids])
        searched.append(compiled.search)
        measured.append(Path(compiled.search["database"], "database_tuning_record.json").read_text())
    assert compiled.path.name == "tvm-llvm-O3-relay-tuned-1x4"
    assert [each["trials"] for each in searched] == [1, 1]
    assert measured[0].count("\n") >= 1
    assert measured[1] == measured[0]  # all trials were done, so nothing was measured again
    assert names(Path(searched[1]["database"])) == [
        "database_tuning_record.json",
        "database_workload.json",
        "search.json",
    ]


@pytest.mark.relay
def test_what_relay_cannot_read_is_one_line_and_it_goes_on(bigram, tmp_path):
    proto = onnx.load(bigram)
    proto.graph.node[0].op_type = "Nonesuch"
    onnx.save(proto, tmp_path / "bad.onnx")
    request = {"shape": [1, 4], "target": "llvm -mcpu=x86-64", "host": None, "opt_level": 0}
    request |= {"library": str(tmp_path / "library.so"), "graph": str(tmp_path / "graph.json")}
    request |= {"scratch": str(tmp_path), "dump": False, "tuning": None}
    with RelayProcess() as relay:
        with pytest.raises(UserError, match=r"^Relay: OpNotImplemented: [^\n]*Nonesuch[^\n]*$"):
            relay.ask("build", 60, model=str(tmp_path / "bad.onnx"), **request)
        with pytest.raises(UserError, match=r"^mcpu 'znver5': not known to LLVM 10, which compiles for Relay; leave"):
            relay.ask("build", 60, model=str(bigram), **request | {"target": "llvm -mcpu=znver5"})
        assert relay.ask("build", 60, model=str(bigram), **request)["phases_s"].keys() == {"import", "build", "export"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"fixed_shape": None}, "--frontend relay compiles for one B and one T.*give --batch and --tokens"),
        ({"fixed_shape": (1, 18)}, r"--batch 1 --tokens 18: B must be at least 1, and T in 1 … 17"),
        ({"fixed_shape": (0, 4)}, r"--batch 0 --tokens 4: B must be at least 1"),
        ({"opt_level": 4}, "opt level 4: must be 0, 1, 2, 3 with --frontend relay"),
        ({"precision": "bf16"}, "--precision: not with --frontend relay"),
        ({"cuda_compiler": "nvrtc"}, "--compiler: not with --frontend relay"),
        ({"fast_math": True}, "--fast-math: not with --frontend relay"),
        ({"without": ("fuse_linear",)}, "--without: not with --frontend relay"),
        ({"mcpu": "skylark"}, "mcpu 'skylark': not known to LLVM"),
    ],
)
def test_a_users_mistake_is_said_before_any_work(bigram, arguments, said):
    with pytest.raises(UserError, match=said):
        compile_model(bigram, options=CompileOptions(frontend="relay", **{"fixed_shape": (1, 4)} | arguments))
    assert names(bigram.parent) == ["model.onnx"]


def test_a_truncated_file_is_refused(bigram):
    bigram.write_bytes(bigram.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model\.onnx: not a readable ONNX file"):
        compile_model(bigram, options=CompileOptions(frontend="relay", fixed_shape=(1, 4)))
    assert names(bigram.parent) == ["model.onnx"]


def test_a_model_without_a_shape_is_refused(tmp_path):
    model = SimpleNamespace(path=tmp_path, fixed_shape=None)
    with pytest.raises(UserError, match=r"compiled by Relay, and for no fixed shape; make it again with"):
        RelaySession(model, 1, None)


def test_without_nvcc_it_says_what_to_install(bigram, monkeypatch):
    monkeypatch.setattr(cuda_toolchain, "_nvcc_candidates", list)
    with pytest.raises(UserError, match=r"--frontend relay --target cuda needs nvcc.*install NVIDIA's CUDA toolkit"):
        compile_model(bigram, options=CompileOptions(frontend="relay", fixed_shape=(1, 4), target="cuda"))
    assert names(bigram.parent) == ["model.onnx"]


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Give Relay an environment in which a shell script of some text is its Python; $3 is the number of the socket."""

    def make(script: str, wheel: str = "bitblas-0.1.0.post1") -> Path:
        folder = tmp_path / "venv"
        packages = folder / "lib/python3.11/site-packages"
        (packages / f"{wheel}.dist-info").mkdir(parents=True)
        (packages / "bitblas/3rdparty/tvm/python/tvm/relay").mkdir(parents=True)
        (folder / "bin").mkdir()
        (folder / "bin/python").write_text(f"#!/bin/bash\n{script}\n")
        (folder / "bin/python").chmod(0o755)
        (folder / "installed").touch()
        monkeypatch.setattr("tvm_frontend.relay.environment.FOLDER", folder)
        return folder

    return make


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo half way; kill -9 $$", r"Relay's process died of SIGKILL; it last said: half way"),
        ("echo no memory >&2; exit 3", r"Relay's process died with exit code 3; it last said: no memory"),
        ("echo hello >&$3; exec sleep infinity", r"Relay's process answered what makes no sense: b'hello\\n'"),
        ("echo '[1]' >&$3; exec sleep infinity", r"Relay's process answered what makes no sense: b'\[1\]\\n'"),
        ("echo importing; exec sleep infinity", r"Relay's process gave no answer within 5 s; it last said: importing"),
    ],
    ids=["killed", "exit", "rubbish", "no answer", "hangs"],
)
def test_a_process_that_fails_is_one_line_with_the_end_of_its_log_and_leaves_nothing(
    bigram, environment, monkeypatch, script, said
):
    folder = environment(f"echo $$ > pid; {script}")
    monkeypatch.setattr("tvm_frontend.relay.compile.BUILD_DEADLINE_S", 5 if "within" in said else 100)
    with pytest.raises(UserError, match=rf"^{said}$"):
        compile_model(bigram, options=CompileOptions(frontend="relay", fixed_shape=(1, 4)))
    assert not Path("/proc", (folder / "pid").read_text().strip()).exists()  # nor was it waited for: it never ends
    assert names(bigram.parent) == ["model.onnx", "venv"]


def test_another_wheel_is_named(bigram, environment):
    folder = environment("", wheel="bitblas-0.1.0")
    said = f"{folder} has bitblas-0.1.0, and Relay is in bitblas-0.1.0.post1: remove it and run: make relay"
    with pytest.raises(UserError, match=re.escape(said)):
        compile_model(bigram, options=CompileOptions(frontend="relay", fixed_shape=(1, 4)))


def test_an_unfinished_environment_is_named(bigram, environment):
    folder = environment("")
    (folder / "installed").unlink()
    with pytest.raises(UserError, match=re.escape(f"{folder} is incomplete: remove it and run: make relay")):
        compile_model(bigram, options=CompileOptions(frontend="relay", fixed_shape=(1, 4)))


def test_an_absent_environment_is_named_where_it_is_needed(bigram, tmp_path, monkeypatch):
    monkeypatch.setattr("tvm_frontend.relay.environment.FOLDER", tmp_path / ".venv-relay")
    said = r"^--frontend relay: no \.venv-relay, in which Relay runs: make relay$"
    with pytest.raises(UserError, match=said):
        compile_model(bigram, options=CompileOptions(frontend="relay", fixed_shape=(1, 4)))
    assert names(bigram.parent) == ["model.onnx"]
