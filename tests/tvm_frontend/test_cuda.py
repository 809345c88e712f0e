import logging

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op
from tvm.relax.backend.cuda import pipeline
from tvm.s_tir import ScheduleError, dlight

from gpt.cli import UserError
from tvm_frontend import cuda_toolchain
from tvm_frontend.cuda_toolchain import cubin_archs, cuda_machine_code, find_compiler, verify_cuda_library
from tvm_frontend.kernels.cuda.default import ScheduleKernels, schedule_cuda
from tvm_frontend.target import resolve_target

pytestmark = pytest.mark.slow

B, T = tvm.tirx.Var("B", "int64"), tvm.tirx.Var("T", "int64")


@pytest.fixture(params=["nvcc", "nvrtc"])
def compiler(request):
    try:
        find_compiler(request.param)
    except UserError as error:
        pytest.skip(str(error))
    return request.param


def softmax_of_product():
    """x [B,T,64], w [64,64] -> softmax(x @ w) [B,T,64]."""
    builder = relax.BlockBuilder()
    x, w = (
        relax.Var("x", relax.TensorType((B, T, 64), "float32")),
        relax.Var("w", relax.TensorType((64, 64), "float32")),
    )
    with builder.function("forward", [x, w]):
        with builder.dataflow():
            out = builder.emit_output(op.nn.softmax(builder.emit(op.matmul(x, w))))
        builder.emit_func_output(out)
    return builder.get()


class TinyGPT:
    """One layer with fixed weights, twice: as a Relax module with B and T symbolic, and in numpy."""

    V, C, nh, hs, block_size = 11, 32, 4, 8, 16

    def __init__(self):
        rng = np.random.default_rng(0)
        C = self.C
        shapes = {"wte": (self.V, C), "wpe": (self.block_size, C), "g": (C,), "b": (C,)}
        shapes |= {"qkv": (C, 3 * C), "qkv_b": (3 * C,), "proj": (C, C), "fc": (C, 4 * C), "out": (4 * C, C)}
        self.w = {name: rng.normal(0, 0.3, shape).astype("float32") for name, shape in shapes.items()}

    def relax(self):
        builder, w = relax.BlockBuilder(), {name: relax.const(value) for name, value in self.w.items()}
        emit, C = builder.emit, self.C
        ids = relax.Var("ids", relax.TensorType((B, T), "int64"))
        with builder.function("forward", [ids]):
            with builder.dataflow():
                tokens = emit(op.take(w["wte"], emit(op.reshape(ids, (B * T,))), axis=0))
                positions = emit(op.take(w["wpe"], emit(op.arange(0, T, 1, "int64")), axis=0))
                x = emit(op.add(emit(op.reshape(tokens, (B, T, C))), positions))  # [B,T,C]
                h = emit(op.nn.layer_norm(x, w["g"], w["b"], axes=[-1]))
                qkv = emit(op.add(emit(op.matmul(h, w["qkv"])), w["qkv_b"]))  # [B,T,3C]
                parts = [emit(op.strided_slice(qkv, [2], [i * C], [(i + 1) * C])) for i in range(3)]
                q, k, v = (emit(op.reshape(part, (B, T, self.nh, self.hs))) for part in parts)
                attended = emit(op.nn.attention(q, k, v, causal_mask="TopLeft"))  # [B,T,nh,hs]
                x = emit(op.add(x, emit(op.matmul(emit(op.reshape(attended, (B, T, C))), w["proj"]))))
                h = emit(op.nn.layer_norm(x, w["g"], w["b"], axes=[-1]))
                h = emit(op.nn.gelu_tanh(emit(op.matmul(h, w["fc"]))))  # [B,T,4C]
                x = emit(op.add(x, emit(op.matmul(h, w["out"]))))
                logits = builder.emit_output(op.matmul(x, emit(op.permute_dims(w["wte"]))))  # [B,T,V]
            builder.emit_func_output(logits)
        return builder.get()

    def numpy(self, ids):
        w, (batch, length) = self.w, ids.shape
        x = w["wte"][ids] + w["wpe"][:length]  # [B,T,C]
        qkv = self._norm(x) @ w["qkv"] + w["qkv_b"]  # [B,T,3C]
        q, k, v = (part.reshape(batch, length, self.nh, self.hs).swapaxes(1, 2) for part in np.split(qkv, 3, -1))
        scores = q @ k.swapaxes(2, 3) / np.sqrt(self.hs) + np.triu(np.full((length, length), -np.inf), 1)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        attended = weights / weights.sum(-1, keepdims=True) @ v  # [B,nh,T,hs]
        x = x + attended.swapaxes(1, 2).reshape(batch, length, self.C) @ w["proj"]
        h = self._norm(x) @ w["fc"]
        h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        return (x + h @ w["out"]) @ w["wte"].T

    def _norm(self, x):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt(centred.var(-1, keepdims=True) + 1e-5) * self.w["g"] + self.w["b"]


def compile_cuda(module, path, arch, compiler="auto"):
    target = resolve_target("cuda", arch=arch)
    tvm_target = target.to_tvm()
    passes = [
        *schedule_cuda(target),
        *pipeline.dataflow_lower_passes(tvm_target),
        *pipeline.finalize_passes(tvm_target),
    ]
    with cuda_machine_code(arch, compiler), tvm_target:
        executable = tvm.compile(module, tvm_target, relax_pipeline=tvm.transform.Sequential(passes))
    executable.export_library(str(path))
    return path


@pytest.mark.parametrize("arch", ["sm_86", "sm_90"])
def test_each_compiler_makes_machine_code_of_the_asked_arch(compiler, arch, tmp_path):
    library = compile_cuda(softmax_of_product(), tmp_path / "kernels.so", arch, compiler)
    verify_cuda_library(library, arch)
    data = library.read_bytes()
    assert cubin_archs(data) == {arch}
    assert b"__global__" not in data  # no source beside it
    with pytest.raises(RuntimeError, match=rf"holds machine code for {arch}, and was to hold it for sm_75"):
        verify_cuda_library(library, "sm_75")


def test_a_gpt_with_any_batch_and_length_compiles(compiler, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        library = compile_cuda(TinyGPT().relax(), tmp_path / "gpt.so", "sm_86", compiler)
    assert cubin_archs(library.read_bytes()) == {"sm_86"}
    assert caplog.records == []  # no rule failed on a float32 kernel


def test_the_gpt_that_is_compiled_for_cuda_is_right_on_the_cpu():
    gpt = TinyGPT()
    executable = tvm.compile(gpt.relax(), resolve_target("llvm").to_tvm())
    forward = relax.VirtualMachine(executable, tvm.cpu())["forward"]
    for shape in [(1, 1), (2, 5), (3, 16)]:
        ids = np.random.default_rng(1).integers(0, gpt.V, shape)
        np.testing.assert_allclose(forward(tvm.runtime.tensor(ids)).numpy(), gpt.numpy(ids), rtol=1e-4, atol=1e-4)


class FailingRule(dlight.ScheduleRule):
    def apply(self, func, target, tunable):
        raise ScheduleError("compute-at: not a stage pipeline")


def test_a_rule_that_fails_hands_over_to_the_next_and_is_named(caplog):
    module = relax.transform.LegalizeOps()(softmax_of_product())
    rules = (FailingRule(), dlight.gpu.Fallback())
    with caplog.at_level(logging.WARNING):
        scheduled = ScheduleKernels(resolve_target("cuda").to_tvm(), rules)(module)
    assert "kernel matmul: rule FailingRule failed" in caplog.text
    assert scheduled["matmul"].attrs["tirx.is_scheduled"]
    assert scheduled["softmax"].attrs["tirx.is_scheduled"]


def test_when_every_rule_fails_the_failure_is_raised():
    module = relax.transform.LegalizeOps()(softmax_of_product())
    with pytest.raises(ScheduleError, match="not a stage pipeline"):
        ScheduleKernels(resolve_target("cuda").to_tvm(), (FailingRule(),))(module)


def test_kernels_left_as_source_are_found_out(tmp_path, monkeypatch):
    monkeypatch.setenv("TVM_COMPILE_FORCE_FALLBACK", "1")  # what TVM does by itself where no driver is
    target = resolve_target("cuda")
    executable = tvm.compile(softmax_of_product(), target.to_tvm())
    executable.export_library(str(tmp_path / "source.so"))
    with pytest.raises(RuntimeError, match="no CUDA machine code"):
        verify_cuda_library(tmp_path / "source.so", "sm_86")


def test_outside_the_block_tvm_is_as_it_was(compiler):
    import tvm_ffi

    asked = []
    build_source = tvm_ffi.get_global_func("target.build.cuda")
    tvm_ffi.register_global_func("target.build.cuda", lambda *_: asked.append("before"), override=True)
    try:
        with pytest.raises(KeyError), cuda_machine_code("sm_86", compiler):
            raise KeyError
        tvm_ffi.get_global_func("target.build.cuda")(None, None)
    finally:
        tvm_ffi.register_global_func("target.build.cuda", build_source, override=True)
    assert asked == ["before"]


def test_kernels_for_another_arch_are_refused(compiler):
    other = resolve_target("cuda", arch="sm_90").to_tvm()
    with pytest.raises(ValueError, match="arch sm_90 inside"), cuda_machine_code("sm_86", compiler):
        tvm.compile(softmax_of_product(), other)


@pytest.mark.parametrize(
    ("compiler", "missing"), [("auto", "neither nvcc nor NVRTC"), ("nvcc", "no nvcc"), ("nvrtc", "no nvrtc")]
)
def test_without_a_compiler_the_user_is_told_what_to_install(compiler, missing, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(cuda_toolchain, "_toolkits", lambda: ([], [], []))
    with (
        pytest.raises(UserError, match=rf"{missing}.*pip install nvidia-cuda-nvrtc"),
        cuda_machine_code("sm_86", compiler),
    ):
        pytest.fail("the block must not be entered")


def test_an_arch_that_the_compiler_does_not_know_is_refused(compiler):
    with (
        pytest.raises(UserError, match="does not compile for sm_50; it knows sm_"),
        cuda_machine_code("sm_50", compiler),
    ):
        pytest.fail("the block must not be entered")


def test_a_compiler_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match="one of auto, nvcc, nvrtc"):
        find_compiler("clang")


def test_broken_source_gives_the_compilers_words(compiler):
    with pytest.raises(RuntimeError, match="undefined_thing") as caught:
        find_compiler(compiler).compile("__global__ void f() { " + 1000 * "undefined_thing(); " + "}", "sm_86")
    assert len(str(caught.value).splitlines()) <= 11


def test_an_error_quotes_the_end_of_a_log_that_names_none():
    assert cuda_toolchain._errors_in("\n".join(map(str, range(1000)))).split() == [str(n) for n in range(990, 1000)]


def test_without_a_gpu_the_cuda_runtime_is_refused(monkeypatch):
    monkeypatch.setattr(cuda_toolchain, "gpu_arch", lambda: None)
    monkeypatch.setattr("tvm_ffi.get_global_func", lambda *_, **__: None)  # as where no driver let TVM register its own
    with pytest.raises(UserError, match="no NVIDIA driver with a GPU"):
        cuda_toolchain.load_cuda_runtime()
