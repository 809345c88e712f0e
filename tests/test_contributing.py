"""The examples of CONTRIBUTING.md, run as they stand there."""

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import tvm
from tvm import relax
from tvm.relax import op

from bench.backends import engine_names, find_candidates
from bench.correctness.agreement import compare_logits, random_ids
from bench.correctness.reference import allowed_of
from bench.models.artifacts import Artifacts
from gpt.checkpoint import save_checkpoint, seeded_checkpoint
from gpt.config import GPTConfig
from tvm_frontend import pipeline
from tvm_frontend.graph import ENTRY, Graph
from tvm_frontend.kernels import kernels_for
from tvm_frontend.kernels.cpu import CpuKernels
from tvm_frontend.pipeline import graph_phases, machine_code
from tvm_frontend.target import resolve_target

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = {
    block.partition("\n")[0].removeprefix("# "): block for block in re.findall(r"```python\n(.*?)```", TEXT, re.S)
}
METHOD = "a method of CpuKernels in tvm_frontend/kernels/cpu/__init__.py"

B, T = tvm.tirx.Var("B", "int64"), tvm.tirx.Var("T", "int64")
V, BLOCK_SIZE, C = 11, 9, 32
CONFIG = GPTConfig(block_size=16, vocab_size=V, n_layer=1, n_head=2, n_embd=16)


@pytest.fixture
def module_of(tmp_path: Path) -> Callable[[str], ModuleType]:
    """Write an example's file to a folder, as TVM reads a kernel's source, and import it."""

    def load(name: str) -> ModuleType:
        path = tmp_path / Path(name).name
        path.write_text(BLOCKS[name])
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="module")
def graph() -> Graph:
    """forward(ids [B, T]) = relu(tokens[ids] + positions[0 … T - 1] + 0), which every example is about."""
    rng = np.random.default_rng(0)
    weights = {
        name: rng.normal(size=(rows, C)).astype("float32") for name, rows in [("tokens", V), ("positions", BLOCK_SIZE)]
    }
    builder = relax.BlockBuilder()
    ids = relax.Var("ids", relax.TensorType((B, T), "int64"))
    tables = [relax.Var(name, relax.TensorType(each.shape, "float32")) for name, each in weights.items()]
    with builder.function(ENTRY, [ids, *tables], attrs={"num_input": 1}):
        with builder.dataflow():
            counted = builder.emit(op.arange(*map(relax.prim_value, (0, T, 1)), dtype="int64"))
            rows = [builder.emit(op.take(tables[0], ids, axis=0)), builder.emit(op.take(tables[1], counted, axis=0))]
            shifted = builder.emit(op.add(builder.emit(op.add(*rows)), relax.const(0, "float32")))
            out = builder.emit_output(op.nn.relu(shifted))
        builder.emit_func_output(out)
    return Graph(builder.finalize(), weights)


def check(lowered: Graph) -> None:
    """Compile a lowered graph, run it, and compare it with numpy."""
    executable, _ = machine_code(lowered, resolve_target())
    weights = [tvm.runtime.tensor(each) for each in lowered.weights.values()]
    ids = np.random.default_rng(1).integers(0, V, (3, 7))
    out = relax.VirtualMachine(executable, tvm.cpu())[ENTRY](tvm.runtime.tensor(ids), weights).numpy()
    tokens, positions = lowered.weights["tokens"], lowered.weights["positions"]
    np.testing.assert_array_equal(out, np.maximum(tokens[ids] + positions[:7], 0))


def run_phases(graph: Graph, *added: pipeline.Phase) -> Graph:
    """Run the pipeline with more phases at its beginning, where the document says that they go."""
    for _, phase in [*added, *graph_phases(resolve_target(), 3)]:
        graph = phase(graph)
    return graph


def test_every_example_is_run() -> None:
    assert {name for name in BLOCKS if name != METHOD} == {
        "bench/backends/float64.py",
        "tvm_frontend/passes/cancel_zeros.py",
        "tvm_frontend/kernels/cpu/relu.py",
        "tvm_frontend/passes/fuse_relu.py",
        "tvm_frontend/kernels/first.py",
    }
    assert METHOD in BLOCKS


def test_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = tmp_path / "contributed_engines"
    registry.mkdir()
    (registry / "__init__.py").touch()
    (registry / "float64.py").write_text(BLOCKS["bench/backends/float64.py"])
    monkeypatch.syspath_prepend(tmp_path)
    assert engine_names("contributed_engines") == ["float64"]
    [found] = find_candidates(package="contributed_engines")
    assert (found.label, found.phases, found.absent) == ("float64", ("prefill",), None)

    checkpoint = seeded_checkpoint(CONFIG)
    save_checkpoint(tmp_path / "ckpt.pt", checkpoint)
    engine = sys.modules["contributed_engines.float64"].Engine()
    engine.load(Artifacts(tmp_path), CONFIG, 1, "")
    ids = random_ids(CONFIG, 2, 5, seed=0)
    reference = checkpoint.build(attention="explicit").double()(torch.from_numpy(ids))
    agreement = compare_logits(reference.detach().numpy(), engine.prefill(ids), allowed_of(checkpoint, "fp32"))
    assert agreement.agrees, agreement.reason


def test_a_rewrite(module_of: Callable[[str], ModuleType], graph: Graph) -> None:
    cancel_zeros = module_of("tvm_frontend/passes/cancel_zeros.py").cancel_zeros
    assert '("cancel_zeros", cancel_zeros),' in TEXT
    assert graph.module.script().count("R.add") - cancel_zeros(graph).module.script().count("R.add") == 1
    check(run_phases(graph, ("cancel_zeros", cancel_zeros)))


def test_a_kernel(module_of: Callable[[str], ModuleType], graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    relu = module_of("tvm_frontend/kernels/cpu/relu.py").relu
    fuse_relu = module_of("tvm_frontend/passes/fuse_relu.py").fuse_relu
    namespace = {"relu": relu, "tvm": tvm}
    exec(BLOCKS[METHOD], namespace)
    monkeypatch.setattr(CpuKernels, "relu", namespace["relu"], raising=False)
    namespace["relu"] = relu
    kernels = kernels_for(resolve_target())
    lowered = run_phases(graph, ("fuse_relu", lambda graph: fuse_relu(graph, kernels)))
    assert lowered.kernels["relu"] == 1
    check(lowered)
    assert kernels.relu(C + 1) is None


def test_a_target(module_of: Callable[[str], ModuleType], graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    first = module_of("tvm_frontend/kernels/first.py").FirstKernels()
    monkeypatch.setattr(pipeline, "kernels_for", lambda target, precision: first)
    # The embedding's kernel takes the two tables; the sum with zero stands behind it and is TVM's, as the ReLU.
    lowered = run_phases(graph)
    assert lowered.kernels["embedding"] == 1
    check(lowered)
