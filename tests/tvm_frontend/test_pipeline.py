import re

import onnx
import pytest

from gpt.config import GPTConfig
from tvm_frontend.frontends.onnx.importer import import_onnx
from tvm_frontend.pipeline import compile_graph, graph_phases
from tvm_frontend.target import resolve_target

TARGET = resolve_target()
NO_BIAS = GPTConfig(block_size=8, vocab_size=37, n_layer=2, n_head=3, n_embd=21, bias=False, activation="gelu")


def rewritten(path):
    graph = import_onnx(onnx.load(path))
    for name, phase in graph_phases(TARGET, 3):
        if name == "lower":
            break
        graph = phase(graph)
    return graph


def test_a_model_of_two_layers_is_one_and_fourteen_and_two_kernels(exported, calls):
    assert calls(rewritten(exported.path)) == {
        "embedding": 1,
        "layer_norm": 2 * 2 + 1,
        "linear": 2 + 1,
        "causal_attention": 2,
        "linear_residual": 2 * 2,
        "linear_gelu_tanh": 2,
    }


@pytest.mark.slow
def test_so_is_one_without_bias_and_with_exact_gelu(export, calls):
    found = calls(rewritten(export(NO_BIAS)[1].path))
    assert found["linear_gelu"] == 2
    assert found.total() == 1 + 2 * 7 + 2


def test_at_opt_level_0_there_is_no_rewrite():
    assert [name for name, _ in graph_phases(TARGET, 0)] == ["bundle_weights", "lower"]


def test_a_weight_that_was_packed_is_not_kept_beside_it(exported):
    weights = rewritten(exported.path).weights
    packed = [name.removesuffix(".packed").removesuffix(".transposed") for name in weights if name.endswith(".packed")]
    assert len(packed) == 2 * 4 + 1
    assert set(packed) & weights.keys() == {"lm_head.weight"}  # which the embedding reads


@pytest.fixture(scope="module")
def compilation(exported):
    return compile_graph(lambda: import_onnx(onnx.load(exported.path)), TARGET)


@pytest.fixture(scope="module")
def functions(compilation):
    """The library's functions in LLVM's language, by name."""
    (kernels,) = compilation.executable.mod.imports
    texts = re.split(r"\n(?=define )", kernels.inspect_source("ll"))
    return {re.search(r"@([\w.]+)\(", text)[1]: text for text in texts if text.startswith("define ")}


@pytest.mark.slow
def test_the_arguments_of_every_kernel_are_promised_not_to_overlap(functions):
    heads = {name: text.split("\n")[0] for name, text in functions.items() if name.endswith("_compute_")}
    # Five shapes of linear, attention, LayerNorm, embedding, two for the head's row, the virtual machine's own three.
    assert len(heads) == 13
    for name, head in heads.items():
        assert head.count("ptr ") == head.count("ptr noalias ") > 0, name


@pytest.mark.slow
@pytest.mark.skipif("fma" not in TARGET.features, reason="this CPU has no fused multiply-add")
def test_the_inner_loop_of_every_linear_is_multiply_adds_on_full_vectors_without_a_store(functions):
    lanes, rows = TARGET.vector_bits // 32, 8 if TARGET.vector_bits == 512 else 6
    loops = 0
    for text in functions.values():
        for block in re.split(r"\n(?=[\w.$-]+:)", text):
            label = block.split(":")[0]
            is_loop = re.search(rf"\n +br i1 .*label %{re.escape(label)}\b", block)
            adds = len(re.findall(rf"@llvm\.fm(?:a|uladd)\.v{lanes}f32\(", block))
            if is_loop and adds >= 4 * 2 * rows:  # four steps of k in an accumulator of two vectors
                assert "store " not in block
                loops += 1
    assert loops == sum(name.startswith("linear") and name.endswith("_compute_") for name in functions) > 0


def test_every_phase_is_timed_in_order(compilation):
    assert list(compilation.phases_s) == [
        "import",
        "recover_gelu",
        "recover_layer_norm",
        "recover_attention",
        "cancel_transposes",
        "merge_projections",
        "fuse_attention",
        "fuse_cached_attention",
        "fuse_linear",
        "fuse_layer_norm",
        "fuse_embedding",
        "cancel_casts",
        "split_head",
        "bundle_weights",
        "lower",
        "promise_no_alias",
        "machine_code",
    ]
    assert min(compilation.phases_s.values()) >= 0
