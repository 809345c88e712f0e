"""Faults of TVM that this project works around. Each test says what should hold: the day it does, the strict xfail
fails, and the code that the test names can go."""

import onnx.parser
import pytest
import tvm
from tvm.script import tirx as T

from tvm_frontend.target import resolve_target


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="tvm_frontend.pipeline._promise_no_alias works around it")
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


@pytest.mark.xfail(strict=True, reason="tvm_frontend.importer: it takes it for com.microsoft's Attention")
def test_the_onnx_importer_takes_attention():
    from tvm.relax.frontend.onnx import from_onnx

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
