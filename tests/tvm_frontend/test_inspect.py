import re
from collections import Counter

import pytest

from gpt.cli import UserError
from gpt.config import GPTConfig
from tvm_frontend import cuda_toolchain
from tvm_frontend.compile import compile_model
from tvm_frontend.cuda_toolchain import find_compiler, find_tool
from tvm_frontend.inspect import KernelCode, code_table, inspect_command, read_kernels
from tvm_frontend.options import CompileOptions

pytestmark = pytest.mark.slow

SMALL = GPTConfig(block_size=64, vocab_size=65, n_layer=1, n_head=2, n_embd=128)
CHAR = GPTConfig(block_size=256, vocab_size=65, n_layer=6, n_head=6, n_embd=384)
# One layer of GPT-2, the others have the same kernels; and its logits at 1,024 positions would take gigabytes to prove.
GPT2 = GPTConfig(block_size=128, vocab_size=50257, n_layer=1, n_head=12, n_embd=768)
PRODUCTS = {"bf16": "HMMA.16816.F32.BF16", "fp16": "HMMA.16816.F32", "tf32": "HMMA.1688.F32.TF32"}
MOST_SHARED = 99 << 10  # of an sm_86's block


@pytest.fixture(scope="module", autouse=True)
def tools():
    for find in (find_compiler, lambda: find_tool("cuobjdump"), lambda: find_tool("nvdisasm")):
        try:
            find()
        except UserError as error:
            pytest.skip(str(error))


@pytest.fixture(scope="module")
def compiled(export, tmp_path_factory):
    made = {}

    def compile_for_gpu(form, precision, config=SMALL):
        if (form, precision, config) not in made:
            _, exported = export(config, form)
            folder = tmp_path_factory.mktemp("cuda")
            made[form, precision, config] = compile_model(
                exported.path,
                folder / "model",
                CompileOptions(target="cuda", precision=precision, dump_ir=folder / "ir"),
            )
        return made[form, precision, config]

    return compile_for_gpu


@pytest.mark.parametrize(
    ("form", "precision", "config"),
    [
        ("forward", "bf16", SMALL),
        ("forward", "fp16", SMALL),
        ("forward", "tf32", SMALL),
        ("cached", "bf16", SMALL),
        ("cached", "bf16", CHAR),
        pytest.param("forward", "bf16", CHAR, marks=pytest.mark.long),
        pytest.param("forward", "bf16", GPT2, marks=pytest.mark.long),
        pytest.param("cached", "bf16", GPT2, marks=pytest.mark.long),
    ],
)
def test_the_machine_code_for_sm_86(compiled, form, precision, config):
    model = compiled(form, precision, config)
    (library,) = model.libraries
    kernels = read_kernels(library, model.launches)
    assert {kernel.arch for kernel in kernels} == {"sm_86"}
    assert {kernel.name for kernel in kernels} == set(model.launches)
    for kernel in kernels:
        assert kernel.spills == 0, kernel
        assert kernel.registers < 255
        assert kernel.shared_bytes <= MOST_SHARED
    on_matrices = [kernel for kernel in kernels if kernel.count("HMMA")]
    for kernel in on_matrices:
        assert {opcode for opcode in kernel.instructions if opcode.startswith("HMMA")} == {PRODUCTS[precision]}
        assert kernel.count("LDGSTS")
        assert kernel.count("LDSM")
    # Linear layers but for few rows, and attention but for one.
    multiply = tuple(f"{name}<" for name in ("linear", "causal_attention", "append_attention"))
    assert on_matrices == [kernel for kernel in kernels if (kernel.function or "").startswith(multiply)]
    assert sum("attention" in kernel.name for kernel in on_matrices) == (precision != "tf32")


@pytest.mark.parametrize("config", [CHAR, GPT2])
def test_a_layer_is_seven_launches(compiled, config):
    """And the embedding, the last LayerNorm, the head: no cast or copy is between them."""
    (rewritten,) = (compiled("forward", "bf16", config).path.parent / "ir").glob("*-cancel_casts.py")
    assert rewritten.read_text().count("R.call_tir(") == 7 * config.n_layer + 3


def test_the_table_for_people(compiled, capsys):
    inspect_command(compiled("forward", "bf16").path)
    lines = capsys.readouterr().out.splitlines()
    columns = "kernel instructions HMMA LDGSTS LDSM spills registers threads shared KB occupancy"
    assert lines[0].startswith("sm_86, ")
    assert lines[1].split() == columns.split()
    assert any(re.match(r"causal_attention_kernel +\d+ +[1-9]\d* +[1-9]\d* +[1-9]\d* +0 ", line) for line in lines)
    (floor,) = (line for line in lines if line.endswith("causal_attention<Bf16, 2, 64>"))
    # 64 tokens of 2 heads of 64: 64 · 65 / 2 pairs, of 4 · 128 FLOPs, and 64 rows of 4 · 128 numbers of 2 bytes.
    flops, read = 64 * 65 // 2 * 4 * 128, 64 * 4 * 128 * 2
    words = floor.split()[1:5]
    assert [float(word) for word in words] == pytest.approx(
        [flops / 1e9, read / 1e6, read / 936e9 * 1e6, read / 696e9 * 1e6], rel=0.1, abs=0.005
    )


@pytest.mark.parametrize(("arguments", "left_out"), [({}, "append_attention"), ({"tokens": 9}, "decode_split_kv")])
def test_the_work_of_every_kernel_that_a_shape_starts(compiled, capsys, arguments, left_out):
    inspect_command(compiled("cached", "bf16").path, batch=3, **arguments)
    _, _, work = capsys.readouterr().out.partition("one launch, B=3, T=")
    names = {line.split("  ")[-1].split("<")[0] for line in work.splitlines()[2:] if "<" in line}
    assert {"linear", "layer_norm", "embed", "sample"} <= names
    assert left_out not in names


@pytest.mark.parametrize(
    ("form", "arguments", "said"),
    [
        ("cached", {"tokens": 60, "context": 5}, "at most block_size=64"),
        ("cached", {"batch": 0}, "B=0"),
        ("forward", {"context": 5}, "--context: this model was compiled without a cache"),
    ],
)
def test_a_shape_that_the_model_does_not_take_is_refused(compiled, form, arguments, said):
    with pytest.raises(UserError, match=said):
        inspect_command(compiled(form, "bf16").path, **arguments)


def test_what_is_not_for_a_gpu_is_refused(exported, tmp_path):
    model = compile_model(exported.path, tmp_path / "cpu")
    with pytest.raises(UserError, match="compiled for llvm; this command reads the code of GPUs"):
        inspect_command(model.path)


def test_without_the_tools_the_user_is_told_what_to_install(compiled, monkeypatch):
    path = compiled("forward", "bf16").path
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(cuda_toolchain, "_toolkits", lambda: ([], [], []))
    with pytest.raises(UserError, match=r"cuobjdump was not found.*pip install nvidia-cuda-cuobjdump"):
        inspect_command(path)


@pytest.mark.parametrize(
    ("registers", "threads", "shared_bytes", "expected"),
    [(32, 128, 0, 1.0), (168, 128, 49152, 2 * 128 / 1536), (255, 128, 0, 2 * 128 / 1536), (16, 32, 0, 16 * 32 / 1536)],
)
def test_occupancy_by_what_runs_out_first(registers, threads, shared_bytes, expected):
    """Threads; shared memory, 2 of 49 KB; registers, 2 of 32 K; blocks."""
    kernel = KernelCode("k", None, "sm_86", registers, threads, shared_bytes, Counter())
    assert kernel.occupancy == pytest.approx(expected)
    assert KernelCode("k", None, "sm_103", registers, threads, shared_bytes, Counter()).occupancy is None
    assert "–" in code_table([KernelCode("k", None, "sm_103", 1, 32, 0, Counter())])
