"""Operators of com.microsoft with random legal attributes, against ONNX Runtime on the same node.

There is no reference of these operators but ONNX Runtime's own kernels.
"""

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from onnx import numpy_helper

from tests.tvm_frontend.frontends.onnx.judge import Case, compare, compare_at, compiled, file_of, refusal
from tvm_frontend.frontends.onnx.operators import contrib

Random = np.random.Generator
CASES = 4  # of each operator, compiled together


def floats(random: Random, *shape: int) -> np.ndarray:
    return random.standard_normal(shape).astype(np.float32)


def chance(random: Random, of: int = 2) -> bool:
    return bool(random.integers(of) == 0)


def sizes(random: Random, count: int) -> list[int]:
    return [int(size) for size in random.integers(1, 6, count)]


def mask_of(random: Random, B: int, T: int, S: int) -> np.ndarray:
    """One of the four forms of mask_index."""
    form = random.integers(4)
    if form == 0:
        return random.integers(0, S + 1, B).astype(np.int32)
    if form == 1:
        ends = random.integers(1, S + 1, B)
        return np.concatenate([ends, random.integers(0, ends)]).astype(np.int32)
    return random.integers(0, 2, [B, S] if form == 2 else [B, T, S]).astype(np.int32)


def attention(random: Random) -> Case:
    B, T, nh, hs = sizes(random, 4)
    K, C = int(random.integers(1, 9)), nh * hs
    Cv = C if chance(random) else nh * (hs + 1)
    P = int(random.integers(0, 5)) if Cv == C and chance(random) else None
    S = T + (P or 0)
    inputs = {"x": floats(random, B, T, K)}
    constants = {"w": floats(random, K, 2 * C + Cv), "b": floats(random, 2 * C + Cv)}
    order = ["x", "w", "b"]
    attributes = {"num_heads": nh, "unidirectional": int(chance(random))}
    attributes |= {"qkv_hidden_sizes": [C, C, Cv]} if Cv != C else {}
    attributes |= {"scale": 0.7} if chance(random, 3) else {}
    attributes |= {"mask_filter_value": -50.0} if chance(random, 3) else {}
    if chance(random):
        inputs["mask"] = mask_of(random, B, T, S)
    if P is not None:
        inputs["past"] = floats(random, 2, B, nh, P, hs)
    if chance(random, 3):
        inputs["bias"] = floats(random, int(random.choice([1, B])), int(random.choice([1, nh])), T, S)
    order += [name if name in inputs else "" for name in ("mask", "past", "bias")]
    while not order[-1]:
        order.pop()
    return Case("com.microsoft.Attention", order, inputs, constants, attributes, (1, 1) if P is not None else (1,))


def multi_head_attention(random: Random) -> Case:
    B, T, nh, hs = sizes(random, 4)
    L = T if chance(random) else int(random.integers(1, 7))
    in_heads = chance(random, 4)  # cross attention with keys that were made before
    hv = hs if in_heads or chance(random) else hs + 2
    P = int(random.integers(0, 4)) if not in_heads and hv == hs and chance(random) else None
    S = L + (P or 0)
    attributes = {"num_heads": nh} | ({"scale": 0.3} if chance(random, 3) else {})
    attributes["unidirectional"] = int(chance(random) and (P is None or L == T))
    inputs = {"q": floats(random, B, T, nh * hs)}
    inputs["k"] = floats(random, B, nh, L, hs) if in_heads else floats(random, B, L, nh * hs)
    inputs["v"] = floats(random, B, nh, L, hv) if in_heads else floats(random, B, L, nh * hv)
    if not in_heads and chance(random):
        inputs["b"] = floats(random, nh * (2 * hs + hv))
    if chance(random):
        form = random.integers(3)
        shape = [[B], [B, S], [B, T, S]][form]
        inputs["mask"] = random.integers(0, 2 if form else S + 1, shape).astype(np.int32)
    if chance(random, 3):
        inputs["bias"] = floats(random, int(random.choice([1, B])), int(random.choice([1, nh])), T, S)
    if P is not None:
        inputs |= {name: floats(random, B, nh, P, hs) for name in ("past_k", "past_v")}
    order = [name if name in inputs else "" for name in ("q", "k", "v", "b", "mask", "bias", "past_k", "past_v")]
    while not order[-1]:
        order.pop()
    return Case("com.microsoft.MultiHeadAttention", order, inputs, {}, attributes, (1, 1, 1) if P is not None else (1,))


def group_query_attention(random: Random) -> Case:
    """The first call, one of one token, or one of several tokens for one sequence; the cache grows or is as long."""
    nkv = int(random.integers(1, 3))
    nh, hs = nkv * int(random.integers(1, 3)), 16
    first, grows = chance(random), chance(random)
    T = int(random.integers(2, 6)) if first or chance(random) else 1
    B = int(random.integers(1, 4)) if first or T == 1 else 1
    before = 0 if first else int(random.integers(1, 5))
    total = T + before
    seqlens = np.full(B, total - 1, np.int32)
    if first or T == 1:  # some sequences are shorter than the longest
        seqlens[1:] = random.integers(0 if first else T - 1, total, B - 1)
    packed = chance(random, 3)
    inputs = {"q": floats(random, B, T, (nh + 2 * nkv * packed) * hs)}
    if not packed:
        inputs |= {name: floats(random, B, T, nkv * hs) for name in "kv"}
    P = before if grows and not first else total + int(random.integers(0, 3))
    if not (first and chance(random)):
        inputs |= {name: floats(random, B, nkv, P, hs) for name in ("past_k", "past_v")}
    inputs["seqlens"] = seqlens
    constants = {"total": np.array(total, np.int32)}
    attributes = {"num_heads": nh, "kv_num_heads": nkv} | ({"scale": 0.3} if chance(random, 3) else {})
    attributes |= {"softcap": 2.0} if chance(random, 3) else {}
    attributes |= {"local_window_size": int(random.integers(1, 5))} if chance(random, 3) else {}
    if chance(random):
        attributes |= {"do_rotary": 1, "rotary_interleaved": int(chance(random))}
        half = 8  # ONNX Runtime takes multiples of 8
        constants |= {name: floats(random, 12, half) for name in ("cos", "sin")}
        if chance(random):
            inputs["positions"] = random.integers(0, 12, (B, T))
    if chance(random, 3):
        inputs["bias"] = floats(random, int(random.choice([1, B])), int(random.choice([1, nh])), T, total)
    names = ("q", "k", "v", "past_k", "past_v", "seqlens", "total", "cos", "sin", "positions", "bias")
    order = [name if name in inputs or name in constants else "" for name in names]
    while not order[-1]:
        order.pop()
    real = [int(seqlens[b]) + 1 if first else T for b in range(B)]  # rows of the first call that are no padding

    def rows(y: np.ndarray) -> np.ndarray:
        return np.concatenate([y[b, : real[b]] for b in range(B)])

    def cache(y: np.ndarray) -> np.ndarray:
        return np.concatenate([y[b, :, : seqlens[b] + 1] for b in range(B)], axis=1)

    return Case(
        "com.microsoft.GroupQueryAttention",
        order,
        inputs,
        constants,
        attributes,
        (1, 1, 1),
        compared={0: rows, 1: cache, 2: cache},
    )


def rotary_embedding(random: Random) -> Case:
    B, T, nh = sizes(random, 3)
    hs, half = 8, 4
    in_heads, one_start = chance(random), chance(random)
    attributes = {"interleaved": int(chance(random))}
    if chance(random):  # part of each head
        half = 2
        attributes |= {"rotary_embedding_dim": 4, "num_heads": nh}
    x = floats(random, B, nh, T, hs) if in_heads else floats(random, B, T, nh * hs)
    positions = np.array([2]) if one_start else random.integers(0, 12, (B, T))
    constants = {name: floats(random, 12, half) for name in ("cos", "sin")}
    return Case(
        "com.microsoft.RotaryEmbedding", ["x", "p", "cos", "sin"], {"x": x, "p": positions}, constants, attributes
    )


def skip_norm(op: str, biases: list[str]) -> Callable[[Random], Case]:
    def case(random: Random) -> Case:
        B, T = sizes(random, 2)
        C = int(random.integers(3, 9))
        skip = [[B, T, C], [1, T, C], [T, C]][random.integers(3)]
        inputs = {"x": floats(random, B, T, C), "skip": floats(random, *skip), "gamma": floats(random, C)}
        inputs |= {name: floats(random, C) for name in biases if chance(random)}
        order = [name if name in inputs else "" for name in ("x", "skip", "gamma", *biases)]
        outputs = [(1,), (1, 0, 0, 1)][random.integers(2)]
        return Case(f"com.microsoft.{op}", order, inputs, {}, {"epsilon": 1e-3} if chance(random) else {}, outputs)

    return case


def rms_norm(random: Random) -> Case:
    B, T, C = sizes(random, 3)
    inputs = {"x": floats(random, B, T, C), "gamma": floats(random, C)}
    attributes = ({"epsilon": 1e-2} if chance(random) else {}) | ({"axis": 2} if chance(random) else {})
    return Case("SimplifiedLayerNormalization", ["x", "gamma"], inputs, {}, attributes | {"stash_type": 1})


def embed_layer_norm(random: Random) -> Case:
    B, T, C = sizes(random, 3)
    inputs = {"ids": random.integers(0, 7, (B, T)).astype(np.int32)}
    constants = {"word": floats(random, 7, C), "place": floats(random, 6, C)}
    if chance(random):
        inputs["segments"] = random.integers(0, 2, (B, T)).astype(np.int32)
        constants["segment"] = floats(random, 2, C)
    constants |= {name: floats(random, C) for name in ("gamma", "beta")}
    if chance(random):
        inputs["mask"] = random.integers(0, 2, (B, T)).astype(np.int32)
    if chance(random):
        inputs["positions"] = random.integers(0, 6, (B, T)).astype(np.int32)
    names = ("ids", "segments", "word", "place", "segment", "gamma", "beta", "mask", "positions")
    order = [name if name in inputs or name in constants else "" for name in names]
    while not order[-1]:
        order.pop()
    attributes = {"epsilon": 1e-3}
    return Case(
        "com.microsoft.EmbedLayerNormalization", order, inputs, constants, attributes, (1, 1, int(chance(random)))
    )


def gelu(op: str, *, bias: bool | None) -> Callable[[Random], Case]:
    """bias: whether there is one; None for either."""

    def case(random: Random) -> Case:
        B, T, C = sizes(random, 3)
        inputs = {"x": 3 * floats(random, B, T, C)}
        if bias or (bias is None and chance(random)):
            inputs["b"] = floats(random, C)
        attributes = {"alpha": float(random.choice([1.702, 1.0]))} if op == "QuickGelu" and chance(random) else {}
        return Case(f"com.microsoft.{op}", list(inputs), inputs, {}, attributes)

    return case


def fused_matmul(op: str) -> Callable[[Random], Case]:
    def case(random: Random) -> Case:
        M, N, K, *batch = sizes(random, 5)
        batch = batch[: random.integers(3)]
        flags = {"transA": int(chance(random)), "transB": int(chance(random))}
        a = [*batch, K, M] if flags["transA"] else [*batch, M, K]
        b = [*(batch if chance(random) else []), *([N, K] if flags["transB"] else [K, N])]
        attributes = flags | ({"alpha": 0.125} if chance(random) else {})
        return Case(
            f"com.microsoft.{op}", ["a", "b"], {"a": floats(random, *a), "b": floats(random, *b)}, {}, attributes
        )

    return case


def fused_gemm(random: Random) -> Case:
    M, N, K = sizes(random, 3)
    turned = int(chance(random))
    inputs = {"a": floats(random, M, K), "b": floats(random, *([N, K] if turned else [K, N])), "c": floats(random, N)}
    attributes = {"transB": turned, "activation": str(random.choice(["Relu", "Tanh", "Sigmoid"]))}
    return Case("com.microsoft.FusedGemm", list(inputs), inputs, {}, attributes)


CASES_OF: dict[str, Callable[[Random], Case]] = {
    "SimplifiedLayerNormalization": rms_norm,
    "com.microsoft.Attention": attention,
    "com.microsoft.BiasGelu": gelu("BiasGelu", bias=True),
    "com.microsoft.EmbedLayerNormalization": embed_layer_norm,
    "com.microsoft.FastGelu": gelu("FastGelu", bias=None),
    "com.microsoft.FusedGemm": fused_gemm,
    "com.microsoft.FusedMatMul": fused_matmul("FusedMatMul"),
    "com.microsoft.Gelu": gelu("Gelu", bias=False),
    "com.microsoft.GroupQueryAttention": group_query_attention,
    "com.microsoft.MultiHeadAttention": multi_head_attention,
    "com.microsoft.QuickGelu": gelu("QuickGelu", bias=False),
    "com.microsoft.RotaryEmbedding": rotary_embedding,
    "com.microsoft.SkipLayerNormalization": skip_norm("SkipLayerNormalization", ["beta", "bias"]),
    "com.microsoft.SkipSimplifiedLayerNormalization": skip_norm("SkipSimplifiedLayerNormalization", ["bias"]),
    "com.microsoft.TransposeMatMul": fused_matmul("TransposeMatMul"),
}


def test_every_operator_is_tried() -> None:
    assert CASES_OF.keys() == contrib.CONVERTERS.keys()


@pytest.mark.parametrize("op", CASES_OF)
def test_an_operator_gives_onnxruntimes_values(op: str) -> None:
    random = np.random.default_rng([list(CASES_OF).index(op), 23])
    compare([CASES_OF[op](random) for _ in range(CASES)])


SHAPES = [(1, 1, 0), (2, 3, 4), (1, 5, 0), (3, 1, 6)]  # B, T, and the length P of a past


def attention_with_past(B: int, T: int, P: int) -> Case:
    random = np.random.default_rng(5)
    constants = {"w": floats(random, 8, 24), "b": floats(random, 24)}
    inputs = {"x": floats(random, B, T, 8), "mask": random.integers(0, 2, (B, P + T)).astype(np.int32)}
    inputs["past"] = floats(random, 2, B, 2, P, 4)
    dims = {"x": ["B", "T", 8], "mask": ["B", "S"], "past": [2, "B", 2, "P", 4]}
    attributes = {"num_heads": 2, "unidirectional": 1}
    names = ["x", "w", "b", "mask", "past"]
    return Case("com.microsoft.Attention", names, inputs, constants, attributes, (1, 1), dims)


def heads_with_past(B: int, T: int, P: int) -> Case:
    random = np.random.default_rng(6)
    inputs = {name: floats(random, B, T, 8) for name in "qkv"}
    inputs |= {name: floats(random, B, 2, P, 4) for name in ("past_k", "past_v")}
    dims = {name: ["B", "T", 8] for name in "qkv"} | {name: ["B", 2, "P", 4] for name in ("past_k", "past_v")}
    names = ["q", "k", "v", "", "", "", "past_k", "past_v"]
    attributes = {"num_heads": 2, "unidirectional": 1}
    return Case("com.microsoft.MultiHeadAttention", names, inputs, {}, attributes, (1, 1, 1), dims)


def grouped_with_past(B: int, T: int, P: int) -> Case:
    """The lengths as the model builder of ONNX Runtime writes them: from a mask of ones, whose width is the total."""
    random = np.random.default_rng(7)
    B = B if T == 1 or P == 0 else 1  # several tokens behind a past are of one sequence
    inputs = {"q": floats(random, B, T, 64), "k": floats(random, B, T, 32), "v": floats(random, B, T, 32)}
    inputs |= {name: floats(random, B, 2, P, 16) for name in ("past_k", "past_v")}
    inputs |= {"mask": np.ones((B, P + T), np.int32), "seqlens": np.full(B, P + T - 1, np.int32)}
    dims = {"q": ["B", "T", 64], "k": ["B", "T", 32], "v": ["B", "T", 32], "mask": ["B", "S"], "seqlens": ["B"]}
    dims |= {name: ["B", 2, "P", 16] for name in ("past_k", "past_v")}
    constants = {"one": np.array(1)} | {name: floats(random, 20, 8) for name in ("cos", "sin")}
    before = (
        ("Shape", ["mask"], "shape", {}),
        ("Gather", ["shape", "one"], "width", {"axis": 0}),
        ("Cast", ["width"], "total", {"to": 6}),
    )
    names = ["q", "k", "v", "past_k", "past_v", "seqlens", "total", "cos", "sin"]
    attributes = {"num_heads": 4, "kv_num_heads": 2, "do_rotary": 1, "local_window_size": 4}
    return Case(
        "com.microsoft.GroupQueryAttention", names, inputs, constants, attributes, (1, 1, 1), dims, before=before
    )


@pytest.mark.parametrize("make", [attention_with_past, heads_with_past, grouped_with_past])
def test_lengths_are_symbols(make: Callable[..., Case]) -> None:
    compare_at(make, SHAPES)


def plain_attention(B: int, T: int) -> Case:
    random = np.random.default_rng(8)
    constants = {"w": floats(random, 8, 24), "b": floats(random, 24)}
    attributes = {"num_heads": 2, "unidirectional": 1}
    x = {"x": floats(random, B, T, 8)}
    return Case("com.microsoft.Attention", ["x", "w", "b"], x, constants, attributes, dims={"x": ["B", "T", 8]})


def test_causal_attention_is_one_kernel() -> None:
    kernels = compare_at(plain_attention, [(1, 1), (2, 7), (1, 33)], opt_level=3)
    assert sorted(name.rstrip("0123456789") for name in kernels) == ["causal_attention", "linear"]


def attention_with_ones(B: int, T: int) -> Case:
    """With a mask that hides nothing: ones, of the shape of the input."""
    ones = numpy_helper.from_array(np.array([1], np.int32))
    before = (("Shape", ["x"], "shape", {"end": 2}), ("ConstantOfShape", ["shape"], "mask", {"value": ones}))
    return replace(plain_attention(B, T), order=["x", "w", "b", "mask"], before=before)


def test_a_mask_of_ones_hides_nothing() -> None:
    kernels = compare_at(attention_with_ones, [(1, 1), (2, 7)], opt_level=3)
    assert sorted(name.rstrip("0123456789") for name in kernels) == ["causal_attention", "linear"]


def packed(count: int) -> tuple[Case, Case]:
    """MultiHeadAttention of q, k and v in one input (3), or of k and v in one (2), and the same of three inputs."""
    random = np.random.default_rng(9)
    parts = [floats(random, 2, 5, 3, 4) for _ in "qkv"]
    apart = {name: part.reshape(2, 5, 12) for name, part in zip("qkv", parts, strict=True)}
    together = np.stack(parts[-count:], axis=3)
    inputs = {"q": together} if count == 3 else {"q": apart["q"], "k": together}
    how = {"op": "com.microsoft.MultiHeadAttention", "attributes": {"num_heads": 3}}
    return Case(order=list(inputs), inputs=inputs, **how), Case(order=list("qkv"), inputs=apart, **how)


@pytest.mark.parametrize("count", [2, 3])
def test_packed_heads_are_those_of_separate_inputs(count: int) -> None:
    """ONNX Runtime packs heads on GPUs alone."""
    found, expected = (compiled(proto)(feeds) for proto, feeds in (file_of([case]) for case in packed(count)))
    np.testing.assert_array_equal(found[0], expected[0])


X = np.zeros((2, 3, 8), np.float32)
W = {"w": np.zeros((8, 24), np.float32)}
ONE = {"num_heads": 2}
GROUPED = {"num_heads": 2, "kv_num_heads": 1}
LENGTHS = {"seqlens": np.zeros(2, np.int32), "total": np.array(3, np.int32)}


def of_attention(more: dict[str, np.ndarray], order: list[str], **attributes) -> Case:
    return Case("com.microsoft.Attention", order, {"x": X} | more, W, ONE | attributes)


def of_groups(order: list[str], outputs: tuple[int, ...] = (1, 1, 1), **attributes) -> Case:
    inputs = {"q": np.zeros((2, 3, 32), np.float32), "seqlens": LENGTHS["seqlens"]}
    inputs |= {name: np.zeros((2, 3, 16), np.float32) for name in "kv"} | {"given": LENGTHS["total"]}
    sink = {"sink": np.zeros(2, np.float32)}
    return Case("com.microsoft.GroupQueryAttention", order, inputs, LENGTHS | sink, GROUPED | attributes, outputs)


GQA = ["q", "k", "v", "", "", "seqlens", "total"]
REFUSED = {
    "rotary positions in Attention": (of_attention({}, ["x", "w"], do_rotary=1), "attribute do_rotary=1 is not"),
    "a shared buffer": (
        of_attention({}, ["x", "w"], past_present_share_buffer=1),
        "attribute past_present_share_buffer=1 is not supported",
    ),
    "a mask of four dimensions": (
        of_attention({"m": np.zeros((2, 1, 9, 9), np.int32)}, ["x", "w", "", "m"]),
        "mask 'm0' of shape .2, 1, 9, 9. is not supported, only .2, 3., .2, 3, 3., .2., .4.",
    ),
    "a bias of other heads": (
        of_attention({"bias": np.zeros((1, 3, 3, 3), np.float32)}, ["x", "w", "", "", "", "bias"]),
        "attention_bias 'bias0' of shape .1, 3, 3, 3. is not supported, only .2, 2, 3, 3.",
    ),
    "rotary positions without angles": (of_groups(GQA, do_rotary=1), "do_rotary=1 without cos_cache and sin_cache"),
    "heads that do not divide": (of_attention({}, ["x", "w"], num_heads=3), "is divisible by 3"),
    "a sink": (of_groups([*GQA, "", "", "", "", "sink"]), "input head_sink .'sink0'. is not supported"),
    "a length that is only known when it runs": (
        of_groups([*GQA[:6], "given"]),
        "'given0' is a tensor where a shape, known while compiling, is needed",
    ),
    "smooth softmax": (of_groups(GQA, smooth_softmax=1), "attribute smooth_softmax=1 is not supported"),
    "a key without a value": (of_groups(["q", "k", "", "", "", "seqlens", "total"]), "only supported together"),
    "the mean of a skipped LayerNorm": (
        Case(
            "com.microsoft.SkipLayerNormalization",
            ["x", "x", "g"],
            {"x": X},
            {"g": np.ones(8, np.float32)},
            outputs=(1, 1),
        ),
        "output 'y0_1', the mean, is not supported",
    ),
    "an activation": (
        Case("com.microsoft.FusedGemm", ["a", "a"], {"a": np.zeros((2, 2), np.float32)}, {}, {"activation": "Elu"}),
        "activation 'Elu' is not supported, only Relu, Sigmoid, Tanh",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_supported_is_named(what: str) -> None:
    case, said = REFUSED[what]
    assert re.search(f"node 'node0'.*{said}", refusal(case))
