"""Operators of com.microsoft with random legal attributes, against ONNX Runtime on the same node.

There is no reference of these operators but ONNX Runtime's own kernels.
"""

from collections.abc import Callable

import numpy as np
import pytest

from tests.tvm_frontend.frontends.onnx.judge import Case, compare
from tvm_frontend.frontends.onnx.operators import contrib

Random = np.random.Generator
CASES = 5  # of each operator, compiled together


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
    names = ("q", "k", "v", "past_k", "past_v", "seqlens", "total", "cos", "sin")
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
