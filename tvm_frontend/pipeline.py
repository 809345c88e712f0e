"""Takes a model to an executable: the phases in order, to be read from top to bottom."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tvm
from tvm import relax
from tvm.relax.backend.cpu_generic import pipeline as cpu_generic

from gpt.cli import UserError
from gpt.files import atomic_output
from gpt.progress import progress_bar
from tvm_frontend.coverage import Coverage, coverage_of
from tvm_frontend.cuda_toolchain import cuda_machine_code
from tvm_frontend.graph import ENTRY, FORGET, Graph
from tvm_frontend.kernels import kernels_for
from tvm_frontend.kernels.cuda import CudaKernels
from tvm_frontend.kernels.cuda.default import schedule_cuda
from tvm_frontend.kernels.cuda.launch import source
from tvm_frontend.options import DEFAULT_OPTIONS, CompileOptions
from tvm_frontend.passes.add_choice import add_choice
from tvm_frontend.passes.cancel_casts import cancel_casts
from tvm_frontend.passes.cancel_transposes import cancel_transposes
from tvm_frontend.passes.fuse_attention import fuse_attention
from tvm_frontend.passes.fuse_cached_attention import fuse_cached_attention
from tvm_frontend.passes.fuse_embedding import fuse_embedding
from tvm_frontend.passes.fuse_layer_norm import fuse_layer_norm
from tvm_frontend.passes.fuse_linear import fuse_linear
from tvm_frontend.passes.merge_projections import merge_projections
from tvm_frontend.passes.recover_attention import recover_attention
from tvm_frontend.passes.recover_gelu import recover_gelu
from tvm_frontend.passes.recover_layer_norm import recover_layer_norm
from tvm_frontend.passes.rewrite import OPAQUE
from tvm_frontend.passes.split_head import split_head
from tvm_frontend.target import CompileTarget
from tvm_frontend.tvm_patches import patch_attention

if TYPE_CHECKING:
    from tvm_frontend.search import Search

OPT_LEVELS = {0: "TVM's own untuned pipeline", 3: "this project's rewrites and schedules"}
LAYOUT_HINT = "layout_free_placeholders"

# Phases that no model can be compiled without.
NEEDED = ("fix_shape", "fold_weights", "legalize", "search", "pack_weights", "bundle_weights", "lower")

Phase = tuple[str, Callable[[Graph], Graph]]

patch_attention()  # before any operator is lowered


@dataclass(frozen=True)
class Compiled:
    """Holds the executable that the phases made, the graph with its weights, and the seconds each phase took.

    launches, coverage: as in `CompiledModel`.
    """

    executable: relax.VMExecutable
    graph: Graph
    phases_s: dict[str, float]
    launches: dict[str, dict[str, Any]]
    coverage: Coverage | None = None


@dataclass
class _Trace:
    """Records the time of each phase, and writes its IR if a folder was asked for."""

    dump_ir: Path | None
    phases_s: dict[str, float] = field(default_factory=dict)

    def record(self, name: str, seconds: float, text: Callable[[], str], suffix: str = "py") -> None:
        self.phases_s[name] = seconds
        if self.dump_ir is not None:
            with atomic_output(self.dump_ir / f"{len(self.phases_s):02d}-{name}.{suffix}") as part:
                part.write_text(text())


def compile_graph(
    import_graph: Callable[[], Graph],
    target: CompileTarget,
    options: CompileOptions = DEFAULT_OPTIONS,
    search: "Search | None" = None,
) -> Compiled:
    """Run every phase: import, rewrites, lowering, machine code. With `dump_ir` the IR after each goes there.

    target: what the options' target, CPU and one arch were resolved to. options: of which `opt_level`, `precision`
    (fp32 if None), `cuda_compiler`, `fast_math`, `without` and `dump_ir` are read. search: schedules the kernels that
    have no hand schedule; see `tvm_frontend.search`. Raises UserError for a phase to leave out that is not there, or
    that every model needs.
    """
    trace = _Trace(options.dump_ir)
    possible = graph_phases(target, options.opt_level, options.precision or "fp32", search)
    optional = [name for name, _ in possible if name not in NEEDED]
    if missing := [name for name in options.without if name not in optional]:
        raise UserError(f"without {missing[0]!r}: must be one of {', '.join(optional) or 'no phase at all'}")
    kept = [phase for phase in possible if phase[0] not in options.without]
    with progress_bar(total=len(kept) + 2, desc="compile", unit="phase", leave=False) as bar:

        def run(name: str, phase: Callable[[], Graph]) -> Graph:
            bar.set_postfix_str(name)
            start = time.perf_counter()
            graph = phase()
            trace.record(name, time.perf_counter() - start, graph.module.script)
            bar.update()
            return graph

        graph = run("import", import_graph)
        coverage = None
        for name, phase in kept:
            if name == "bundle_weights" and options.opt_level > 0 and search is None:
                coverage = coverage_of(graph)
            graph = run(name, partial(phase, graph))
        bar.set_postfix_str("machine_code")
        start = time.perf_counter()
        executable, launches = machine_code(graph, target, options.cuda_compiler, options.fast_math)
        (kernels,) = executable.mod.imports
        trace.record("machine_code", time.perf_counter() - start, lambda: kernels.inspect_source("ll"), "ll")
        bar.update()
    return Compiled(executable, graph, trace.phases_s, launches, coverage)


def graph_phases(
    target: CompileTarget, opt_level: int, precision: str = "fp32", search: "Search | None" = None
) -> list[Phase]:
    """List the phases between the imported graph and machine code."""
    kernels = kernels_for(target, precision) if opt_level > 0 else None
    rewrites: list[Phase] = []
    if opt_level > 0:
        rewrites += [
            ("recover_gelu", recover_gelu),
            ("recover_layer_norm", recover_layer_norm),
            ("recover_attention", recover_attention),
            ("cancel_transposes", cancel_transposes),
        ]
    if kernels is not None:
        rewrites += [
            ("merge_projections", merge_projections),
            ("fuse_attention", lambda graph: fuse_attention(graph, kernels)),
            ("fuse_cached_attention", lambda graph: fuse_cached_attention(graph, kernels)),
            ("fuse_linear", lambda graph: fuse_linear(graph, kernels)),
            ("fuse_layer_norm", lambda graph: fuse_layer_norm(graph, kernels)),
            ("fuse_embedding", lambda graph: fuse_embedding(graph, kernels)),
            ("cancel_casts", cancel_casts),
            ("split_head", split_head),
        ]
    if isinstance(kernels, CudaKernels):
        rewrites.append(("add_choice", lambda graph: add_choice(graph, kernels)))
    if search is not None:
        # The head is split off to take fewer rows, which one of a fixed shape cannot.
        return [
            ("fix_shape", lambda graph: fix_shape(graph, search.shape)),
            *(rewrite for rewrite in rewrites if rewrite[0] not in ("split_head", "add_choice")),
            ("fold_weights", lambda graph: fold_weights(graph, target)),
            ("legalize", lambda graph: legalize(graph, target, opt_level)),
            ("search", lambda graph: search(graph, target)),
            *([("pack_weights", lambda graph: pack_weights(graph, target))] if opt_level == 0 else []),
            ("bundle_weights", bundle_weights),
            ("lower", lambda graph: lower(graph, target, opt_level, legalized=True)),
            ("promise_no_alias", promise_no_alias),
        ]
    return [
        *rewrites,
        ("bundle_weights", bundle_weights),
        ("lower", lambda graph: lower(graph, target, opt_level)),
        *([("promise_no_alias", promise_no_alias)] if opt_level > 0 else []),
    ]


def fix_shape(graph: Graph, shape: tuple[int, int]) -> Graph:
    """Bind B and T of forward(ids [B, T], …) to numbers, where they are not numbers already."""
    symbols = graph.module[ENTRY].params[0].ty.shape.values
    sizes = {symbol: size for symbol, size in zip(symbols, shape, strict=False) if isinstance(symbol, tvm.tirx.Var)}
    return Graph(relax.transform.BindSymbolicVars(sizes, ENTRY)(graph.module), graph.weights)


def fold_weights(graph: Graph, target: CompileTarget) -> Graph:
    """Compute now what depends on weights alone, as a transpose."""
    module = relax.transform.LiftTransformParams()(graph.module)
    transform = next(name for name in module.get_global_vars() if name.name_hint.endswith("_transform_params"))
    machine = relax.VirtualMachine(tvm.relax.build(module, target.to_tvm()), tvm.cpu())
    weights = machine[transform.name_hint]([tvm.runtime.tensor(weight) for weight in graph.weights.values()])
    function = module[ENTRY]
    names = [param.name for param in function.params[int(function.attrs["num_input"]) :]]
    del module[transform]
    kept = relax.transform.DeadCodeElimination([ENTRY])(module)
    return Graph(kept, {name: weight.numpy() for name, weight in zip(names, weights, strict=True)})


def pack_weights(graph: Graph, target: CompileTarget) -> Graph:
    """Bring the weights into the layouts that the schedules of kernels marked by `legalize` ask for."""
    return fold_weights(Graph(relax.transform.SplitLayoutRewritePreproc()(graph.module), graph.weights), target)


def legalize(graph: Graph, target: CompileTarget, opt_level: int) -> Graph:
    """Turn Relax operators into kernels without a schedule, fused by TVM, beside the hand-written ones.

    At opt level 0, where there are no hand-written ones, which TVM could not tell apart, it also marks the kernels that
    may choose a weight's layout.
    """
    tvm_target = target.to_tvm()
    passes = _to_kernels(tvm_target)
    if opt_level == 0:
        passes.append(relax.transform.AttachAttrLayoutFreeBuffers())
    with tvm_target:
        module = tvm.transform.Sequential(passes)(graph.module)
    for name, function in module.functions_items():
        if isinstance(function, tvm.tirx.PrimFunc) and not function.attrs.get("tirx.is_scheduled", False):
            module.update_func(name, _without_layout_hints(function))
    return Graph(module, graph.weights)


def bundle_weights(graph: Graph) -> Graph:
    """Make all weights one argument: forward(*inputs, *weights) → forward(*inputs, weights).

    Kernels that nothing calls any more are dropped.
    """
    module = graph.module.clone()
    called = set(graph.entry_points)

    def note(node: relax.Expr) -> None:
        if isinstance(node, tvm.ir.GlobalVar):
            called.add(node.name_hint)

    for _, function in module.functions_items():
        if isinstance(function, relax.Function):
            relax.analysis.post_order_visit(function, note)
    for name in module.get_global_vars():
        if name.name_hint not in called:
            del module[name]
    return Graph(relax.transform.BundleModelParams("weights")(module), graph.weights)


def lower(graph: Graph, target: CompileTarget, opt_level: int, *, legalized: bool = False) -> Graph:
    """Lower Relax to kernels and calls of the virtual machine, or a graph that is `legalized` to the calls alone.

    The virtual machine holds its last result until it has another one: calling `forget` releases it.
    """
    tvm_target = target.to_tvm()
    builder = relax.BlockBuilder(graph.module)
    with builder.function(FORGET, [], attrs={"global_symbol": FORGET}):
        builder.emit_func_output(relax.prim_value(0))
    module = unfused_counts(builder.get())
    if target.kind == "cuda":
        passes = [
            *schedule_cuda(target),
            *cpu_generic.dataflow_lower_passes(tvm_target),
            *cpu_generic.finalize_passes(tvm_target),
        ]
    elif opt_level == 0 and not legalized:
        passes = [relax.get_pipeline("default")]
    else:
        passes = [
            *([] if legalized else _to_kernels(tvm_target)),
            *cpu_generic.dataflow_lower_passes(tvm_target),
            *cpu_generic.finalize_passes(tvm_target),
        ]
    with tvm_target:
        module = tvm.transform.Sequential(passes)(module)
    return Graph(module, graph.weights)


def _to_kernels(target: tvm.target.Target) -> list[tvm.transform.Pass]:
    """List the passes from Relax operators to fused kernels; running sums and top-k have passes of their own."""
    return [*cpu_generic.library_dispatch_passes(target), *cpu_generic.legalize_passes(target)]


def unfused_counts(module: tvm.IRModule) -> tvm.IRModule:
    """Keep kernels that are given a size as a number, as positions behind a past, from being fused with their readers.

    TVM's FuseTIR defines a symbol twice in a kernel that it makes of one of which a parameter and the length are sizes.
    """
    calls = [binding.value for block in module[ENTRY].body.blocks for binding in block.bindings]
    ranges = [call.args for call in calls if getattr(getattr(call, "op", None), "name", "") == "relax.arange"]
    from_a_size = any(not isinstance(getattr(each, "value", each), int | tvm.tirx.IntImm) for each, *_ in ranges)
    module = relax.transform.LegalizeOps()(module) if from_a_size else module
    for name, function in module.functions_items():
        if isinstance(function, tvm.tirx.PrimFunc) and _takes_a_number(function):
            module.update_func(name, function.with_attr("op_pattern", OPAQUE))
    return module


def _takes_a_number(kernel: tvm.tirx.PrimFunc) -> bool:
    """Tell if a parameter is not a tensor."""
    return any(isinstance(param.ty, tvm.ir.PrimType) for param in kernel.params)


def machine_code(
    graph: Graph, target: CompileTarget, cuda_compiler: str = "auto", fast_math: bool = False
) -> tuple[relax.VMExecutable, dict[str, dict[str, Any]]]:
    """Compile kernels to machine code, by LLVM and, for cuda, nvcc or NVRTC; give the launches of `Compiled` too."""
    tvm_target = target.to_tvm()
    if target.kind == "cuda":
        with (
            cuda_machine_code(target.gpu_arch, cuda_compiler, fast_math=fast_math, before=source()) as launches,
            tvm_target,
        ):
            return tvm.relax.build(graph.module, tvm_target, relax_pipeline=None), launches
    return tvm.relax.build(graph.module, tvm_target, relax_pipeline=None), {}


def _without_layout_hints(kernel: tvm.tirx.PrimFunc) -> tvm.tirx.PrimFunc:
    """Drop the annotation by which TVM's batch_matmul says that the layout of its inputs is free.

    Where another block of the kernel computes an input, a search would change the layout for that block alone.
    """
    schedule = tvm.s_tir.Schedule(kernel)
    for block in schedule.get_child_blocks(schedule.get_sblock("root")):
        if LAYOUT_HINT in schedule.get(block).annotations:
            schedule.unannotate(block, LAYOUT_HINT)
    return schedule.mod["main"].with_attrs(kernel.attrs)


def promise_no_alias(graph: Graph) -> Graph:
    """Mark every kernel as having arguments that do not overlap.

    TVM 0.27's LLVM back end drops the promise for all kernels of a module if one lacks it, and the virtual machine's
    own `shape_func` does: the accumulators of every kernel are then stored at each step, three times slower.
    """
    for name, function in graph.module.functions_items():
        if isinstance(function, tvm.tirx.PrimFunc):
            graph.module.update_func(name, function.with_attr("tirx.noalias", True))
    return graph
