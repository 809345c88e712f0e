"""Compares hand-written kernels with a MetaSchedule search: the time until the code is ready, and its speed.

Prints the tables of docs/hand-and-search.md and docs/relay-to-relax.md. Each model is searched once; the search
continues from one number of trials to the next.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

import numpy as np
from tabulate import tabulate

from bench.harness.turns import Build, times_of
from bench.models.build import SEEDED
from gpt.arguments import parse_settings
from gpt.cli import UserError, check_threads

if TYPE_CHECKING:
    from tvm_frontend.artifact import CompiledModel
    from tvm_frontend.graph import Graph
    from tvm_frontend.search import Search

M, K, N = 64, 768, 3072  # the linear layer: x [1, M, K], weight [K, N]
COLUMNS, ALIGNMENT = ("", "", "ready after", "a call", "× untuned"), ("left", "left", "right", "right", "right")
PROMPT = 1, 64  # (B, T) for the demo model


@dataclass(frozen=True)
class SearchConfig:
    """Compare hand-written kernels with a MetaSchedule search.

    The models are linear, GPT-2's widest layer; demo, the demo model at 1x64; and relay, the same by Relay.
    """

    models: tuple[Literal["linear", "demo", "relay"], ...] = ("linear", "demo")
    trials: tuple[int, ...] = (50, 200, 800)  # numbers of trials at which the search is timed
    threads: int = 2  # threads of every kernel


def linear_graph() -> "Graph":
    """Build gelu(x [1, M, K] · W [K, N] + b) with random weights, as the importer would."""
    from tvm import relax

    from tvm_frontend.graph import ENTRY, Graph

    random = np.random.default_rng(0)
    weights = {"W": random.standard_normal((K, N), np.float32), "b": random.standard_normal(N, np.float32)}
    x = relax.Var("x", relax.TensorType((1, M, K), "float32"))
    variables = [relax.Var(name, relax.TensorType(each.shape, "float32")) for name, each in weights.items()]
    builder = relax.BlockBuilder()
    with builder.function(ENTRY, [x, *variables], attrs={"num_input": 1}):
        with builder.dataflow():
            product = builder.emit(relax.op.add(relax.op.matmul(x, variables[0]), variables[1]))
            result = builder.emit_output(relax.op.nn.gelu_tanh(product))
        builder.emit_func_output(result)
    return Graph(builder.get(), weights)


def builds(model: str, config: SearchConfig, folder: Path) -> list[Build]:
    """Compile a model untuned, with hand-written kernels, and by the search at each number of trials."""
    from tvm_frontend.search import Search

    if model == "relay":
        found = [relay_build(trials, config, folder) for trials in (None, *sorted(config.trials))]
        return [found[0], demo_build("by hand", 3, None, config, folder), *found[1:]]
    make = linear_build if model == "linear" else demo_build
    found = [make("untuned", 0, None, config, folder), make("by hand", 3, None, config, folder)]
    for trials in sorted(config.trials):
        search = Search(PROMPT, trials, threads=config.threads)
        search.keep_in(folder / f"{model}-search")
        found.append(make(f"search, {trials} trials", 0, search, config, folder))
    return found


def linear_build(name: str, opt_level: int, search: "Search | None", config: SearchConfig, folder: Path) -> Build:
    """Compile the linear layer with the passes that compile a model."""
    import tvm
    import tvm_ffi
    from tvm import relax

    from tvm_frontend.graph import ENTRY
    from tvm_frontend.options import CompileOptions
    from tvm_frontend.pipeline import compile_graph
    from tvm_frontend.runtime.threads import use_threads
    from tvm_frontend.target import resolve_target

    start = time.perf_counter()
    compiled = compile_graph(linear_graph, resolve_target(), CompileOptions(opt_level=opt_level), search)
    ready_s = time.perf_counter() - start if search is None else search.seconds
    function = relax.VirtualMachine(compiled.executable, tvm.cpu())[ENTRY]
    x = tvm.runtime.tensor(np.random.default_rng(1).standard_normal((1, M, K), np.float32))
    weights = tvm_ffi.convert([tvm.runtime.tensor(weight) for weight in compiled.graph.weights.values()])

    def call() -> object:
        use_threads(config.threads)
        return function(x, weights)

    return Build(name, ready_s, call)


def demo_build(name: str, opt_level: int, search: "Search | None", config: SearchConfig, folder: Path) -> Build:
    """Compile the demo model and bind its forward pass of one PROMPT."""
    from tvm_frontend.compile import compile_model
    from tvm_frontend.options import CompileOptions

    model = demo_model(folder)
    start = time.perf_counter()
    output = folder / ("demo" if search else f"demo-O{opt_level}")
    compiled = compile_model(model, output, CompileOptions(opt_level=opt_level), search=search)
    ready_s = time.perf_counter() - start if search is None else search.seconds
    return prompt_build(name, ready_s, compiled, config)


def relay_build(trials: int | None, config: SearchConfig, folder: Path) -> Build:
    """Do the same by Relay at opt level 3, with its own schedules or a search of `trials` trials in total."""
    from tvm_frontend.options import CompileOptions
    from tvm_frontend.relay.compile import compile_relay

    model = demo_model(folder)
    start = time.perf_counter()
    options = CompileOptions(frontend="relay", fixed_shape=PROMPT)
    compiled = compile_relay(model, folder / "relay", options, trials=trials)
    ready_s = time.perf_counter() - start
    if trials is not None:
        if compiled.search is None:
            raise RuntimeError(f"{compiled.path}: a search of {trials} trials was asked for, and none is recorded")
        ready_s = compiled.search["seconds"]
    name = "untuned, Relay" if trials is None else f"search by Relay, {trials} trials"
    return prompt_build(name, ready_s, compiled, config)


def demo_model(folder: Path) -> Path:
    """Export the demo model with random weights, once."""
    from export.onnx import export_onnx
    from gpt.checkpoint import save_checkpoint, seeded_checkpoint

    model = folder / "model.onnx"
    if not model.exists():
        save_checkpoint(folder / "ckpt.pt", seeded_checkpoint(SEEDED["demo"]))
        export_onnx(folder / "ckpt.pt", model)
    return model


def prompt_build(name: str, ready_s: float, compiled: "CompiledModel", config: SearchConfig) -> Build:
    """Bind a compiled model's forward pass of one PROMPT."""
    from tvm_frontend.runtime import open_session
    from tvm_frontend.runtime.session import CachedSession

    ids = np.random.default_rng(1).integers(0, compiled.gpt.vocab_size, PROMPT)
    session = open_session(compiled, config.threads)
    if isinstance(session, CachedSession):
        raise UserError(f"{compiled.path}: has a cache, and what is compared is a forward pass without one")
    run = session.prefill
    return Build(name, ready_s, lambda: run(ids))


def run_search(config: SearchConfig) -> str:
    """Run the comparison and return it as a Markdown table. Raises UserError for trials below 1."""
    if not config.trials or min(config.trials) < 1:
        raise UserError(f"trials={config.trials}: must be numbers of at least 1")
    check_threads(config.threads)
    rows = []
    with TemporaryDirectory() as folder:
        for model in config.models:
            title = f"GELU(x [{M}, {K}] · W [{K}, {N}] + b)" if model == "linear" else "demo model, 1x64"
            found = builds(model, config, Path(folder))
            times = times_of(found)
            for each, seconds in zip(found, times, strict=True):
                speed = f"{seconds * 1e3:.3f} ms", f"{times[0] / seconds:.1f}"
                rows.append((title, each.name, f"{each.ready_s:.1f} s", *speed))
    return tabulate(rows, COLUMNS, "pipe", colalign=ALIGNMENT, disable_numparse=True)


def main(description: str | None = None) -> None:
    """Parse the command line, compare and print. description: the text that `--help` begins with."""
    print(run_search(parse_settings(SearchConfig, prog="python -m bench.search", description=description)))
