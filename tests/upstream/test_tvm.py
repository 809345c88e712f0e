"""Faults of TVM that this project works around. Each test says what should hold: the day it does, the strict xfail
fails, and the code that the test names can go."""

import inspect

import numpy as np
import onnx.parser
import pytest
import torch
import tvm
from tvm import relax
from tvm.relax.frontend.onnx import from_onnx
from tvm.relax.frontend.torch import from_exported_program
from tvm.relax.transform.legalize_ops import nn as legalize_nn
from tvm.script import tirx as T
from tvm.script.parser.core.parser import ScriptMacro

from tvm_frontend.cuda_toolchain import cubin_archs, gpu_arch
from tvm_frontend.target import resolve_target
from tvm_frontend.tvm_patches import TVMS_ATTENTION, stack_without_source

pytestmark = pytest.mark.slow


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="tvm_frontend.pipeline.promise_no_alias works around it")
def test_a_kernel_that_promises_no_alias_keeps_it_beside_one_that_does_not():
    @T.prim_func(s_tir=True)
    def promising(x: T.Buffer((4,), "float32"), out: T.Buffer((4,), "float32")):
        T.func_attr({"tirx.noalias": True, "global_symbol": "promising"})
        for i in range(4):
            out[i] = x[i] * T.float32(2)

    @T.prim_func(s_tir=True)
    def z_other(x: T.Buffer((4,), "float32"), out: T.Buffer((4,), "float32")):
        T.func_attr({"global_symbol": "z_other"})
        for i in range(4):
            out[i] = x[i] * T.float32(3)

    target = resolve_target().to_tvm()
    text = tvm.compile(tvm.IRModule({"promising": promising, "z_other": z_other}), target).mod.inspect_source("ll")
    (entry,) = (line for line in text.splitlines() if line.startswith("define") and "@__tvm_ffi_promising(" in line)
    assert "noalias" in entry


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="tvm_frontend.tvm_patches finds the parser itself")
def test_a_macro_is_expanded_without_reading_the_source_of_its_callers(monkeypatch):
    lines_read = count_lines_read(monkeypatch)
    monkeypatch.setattr(ScriptMacro, "_find_parser_def", inspect.unwrap(ScriptMacro._find_parser_def))
    monkeypatch.setattr(inspect, "stack", stack_without_source)  # the next test's fault

    @T.macro
    def double(out):
        out[0] = out[0] * T.float32(2)

    @T.prim_func(s_tir=True)
    def kernel(out: T.Buffer((1,), "float32")):
        double(out)

    assert sum(lines_read) == 0


@pytest.mark.xfail(
    strict=True, raises=AssertionError, reason="tvm_frontend.tvm_patches imports the intrinsics without source"
)
def test_a_kernel_is_defined_without_reading_the_source_of_its_callers(monkeypatch):
    lines_read = count_lines_read(monkeypatch)

    @T.prim_func(s_tir=True)
    def kernel(out: T.Buffer((1,), "float32")):
        out[0] = out[0] * T.float32(2)

    assert sum(lines_read) == 0


def count_lines_read(monkeypatch):
    """The number of lines of source that each look at a frame asks for from now on."""
    lines_read = []
    getframeinfo = inspect.getframeinfo
    monkeypatch.setattr(
        inspect, "getframeinfo", lambda frame, context=1: lines_read.append(context) or getframeinfo(frame, context)
    )
    return lines_read


@pytest.mark.xfail(strict=True, raises=RuntimeError, reason="tvm_frontend.tvm_patches registers the errors")
def test_an_exception_keeps_its_type_on_its_way_through_tvm():
    class Mistake(ValueError):
        pass

    @tvm.transform.module_pass(opt_level=0)
    def failing(module, context):
        raise Mistake("stop")

    with pytest.raises(Mistake, match="stop"):
        tvm.transform.Sequential([failing])(tvm.IRModule({}))


@pytest.mark.skipif(gpu_arch() is not None, reason="there is a driver, with which TVM makes machine code itself")
@pytest.mark.xfail(strict=True, raises=AssertionError, reason="tvm_frontend.tvm_patches.replaced_cuda_build makes it")
def test_cuda_is_compiled_to_machine_code_where_no_driver_is(tmp_path):
    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((4,), "float32"), y: T.Buffer((4,), "float32")):
        for i in T.thread_binding(4, thread="threadIdx.x"):
            y[i] = x[i]

    target = resolve_target("cuda").to_tvm()
    tvm.compile(tvm.IRModule({"kernel": kernel}), target).export_library(str(tmp_path / "kernel.so"))
    assert cubin_archs((tmp_path / "kernel.so").read_bytes()) == {"sm_86"}


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="tvm_frontend.tvm_patches lowers attention itself")
def test_causal_attention_of_scores_far_below_0_is_no_nan(monkeypatch):
    monkeypatch.setattr(legalize_nn, "_te_attention", TVMS_ATTENTION)
    given = [relax.Var(name, relax.TensorType((1, 2, 1, 1), "float32")) for name in "qkv"]
    builder = relax.BlockBuilder()
    with builder.function("attend", given):
        builder.emit_func_output(builder.emit(relax.op.nn.attention(*given, causal_mask="TopLeft")))
    machine = relax.VirtualMachine(tvm.compile(builder.get(), "llvm"), tvm.cpu())
    q, k, v = (np.full((1, 2, 1, 1), value, "float32") for value in (-15, 10, 1))
    attended = machine["attend"](*map(tvm.runtime.tensor, (q, k, v)))
    np.testing.assert_allclose(attended.numpy(), v)


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="tvm_frontend.pipeline.lower adds `forget` for it")
def test_a_result_that_nobody_holds_leaves_its_memory_to_the_next():
    x = relax.Var("x", relax.TensorType((300, 1000), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("double", [x]):
        builder.emit_func_output(builder.emit(relax.op.add(x, x)))
    machine = relax.VirtualMachine(tvm.compile(builder.get(), "llvm"), tvm.cpu())
    given = tvm.runtime.tensor(np.ones((300, 1000), "float32"))
    assert len({np.from_dlpack(machine["double"](given)).ctypes.data for _ in range(3)}) == 1


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="tvm_frontend.kernels.cpu gives no buffer this scope")
def test_a_local_buffer_of_a_few_values_is_on_the_stack():
    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((8, 4), "float32"), y: T.Buffer((8, 4), "float32")):
        for i in T.parallel(8):
            doubled = T.alloc_buffer((4,), "float32", scope="local")
            for k in range(4):
                doubled[k] = x[i, k] * x[i, 3 - k]
            for k in range(4):
                y[i, k] = doubled[3 - k]

    assert "AllocWorkspace" not in tvm.compile(tvm.IRModule({"kernel": kernel}), "llvm").mod.inspect_source("asm")


@pytest.mark.xfail(
    strict=True, reason="tvm_frontend.frontends.onnx.importer: it takes it for com.microsoft's Attention"
)
def test_the_onnx_importer_takes_attention():
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 23]>
        attend (float[1,2,4,8] q, float[1,2,4,8] k, float[1,2,4,8] v) => (float[1,2,4,8] y) {
            y = Attention <is_causal = 1> (q, k, v)
        }
    """)
    from_onnx(model, opset=23)


@pytest.mark.xfail(strict=True, raises=pytest.fail.Exception, reason="tvm_frontend.target checks the name itself")
def test_a_cpu_that_does_not_exist_is_refused():
    with pytest.raises(Exception, match="nonsense"):
        tvm.target.Target({"kind": "llvm", "mcpu": "nonsense"})


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="tvm_frontend.target counts from the CPU's features")
def test_the_width_of_vectors_is_the_cpus():
    width = tvm.get_global_func("target.llvm_get_vector_width")
    assert width(tvm.target.Target({"kind": "llvm", "mcpu": "haswell"})) == 256


@pytest.mark.xfail(strict=True, raises=KeyError, reason="tvm_frontend.frontends.torch names the node")
def test_the_importer_of_torch_takes_a_layer_norm_without_bias():
    class Norm(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.layer_norm(x, (4,), torch.ones(4), None)

    from_exported_program(torch.export.export(Norm(), (torch.ones(2, 4),)), run_ep_decomposition=False)


@pytest.mark.xfail(strict=True, raises=TypeError, reason="tvm_frontend.frontends.torch keeps attention whole")
def test_a_mask_made_of_infinity_is_lowered():
    class Mask(torch.nn.Module):
        def forward(self, x):
            return x + torch.full((3, 3), -torch.inf)

    tvm.compile(from_exported_program(torch.export.export(Mask(), (torch.ones(3, 3),))), "llvm")


@pytest.mark.xfail(strict=True, reason="tvm_frontend.frontends.relax_onnx folds shapes for one B and T")
def test_the_onnx_importer_keeps_the_length_of_a_range():
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 18]>
        count (int64[T] ids) => (int64[T] y) <int64 zero = {0}, int64 one = {1}> {
            length = Shape (ids)
            T = Squeeze (length)
            places = Range (zero, T, one)
            y = Add (ids, places)
        }
    """)
    tvm.compile(from_onnx(model), "llvm")
