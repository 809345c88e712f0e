"""The roofline of the kernels in `device/`: FLOPs and bytes of one launch, by its template arguments."""

import re
from collections.abc import Callable
from dataclasses import dataclass

BYTES = {"Bf16": 2, "Fp16": 2, "Tf32": 4}  # of an element, by DTypeTraits


@dataclass(frozen=True)
class Shape:
    """B sequences of T new tokens each; `context` more of each sequence are in the cache."""

    B: int
    T: int
    context: int = 0

    @property
    def tokens(self) -> int:
        """The number of new tokens of all sequences."""
        return self.B * self.T

    @property
    def pairs(self) -> int:
        """The number of (query, key) pairs that the causal mask leaves, for one head."""
        return self.B * (self.T * self.context + self.T * (self.T + 1) // 2)


@dataclass(frozen=True)
class Work:
    """flops: of matrix products. bytes: of memory traffic if each input is read once and each output written once."""

    flops: int
    bytes: int


def work_of(function: str, shape: Shape) -> Work | None:
    """Compute the work of one launch of `function`, a kernel's name with its template arguments, at a shape.

    Returns None for a kernel that is not launched at that shape, or not known, as in an artifact of an older version.
    """
    name, arguments = _split(function)
    return _KERNELS[name](arguments, shape) if name in _KERNELS else None


def _split(function: str) -> tuple[str, list[str]]:
    """Split `linear<Bf16, Tile<64, 64>, 768>` into `linear` and its three arguments."""
    name, _, inside = function.removesuffix(">").partition("<")
    return name, [each.strip() for each in re.split(r",(?![^<]*>)", inside)]


def _gemm(traits: str, K: str, N: str, has_residual: str, out: str, shape: Shape) -> Work:
    k, n, M = int(K), int(N), shape.tokens
    out_bytes = 4 if out == "StoreF32" else BYTES[traits]
    residual = 4 * n if has_residual == "true" else 0
    return Work(2 * M * k * n, BYTES[traits] * k * n + 4 * n + M * (BYTES[traits] * k + out_bytes * n + residual))


def _linear(arguments: list[str], shape: Shape) -> Work:
    traits, _tile, K, N, _activation, has_residual, out = arguments
    return _gemm(traits, K, N, has_residual, out, shape)


def _skinny_gemm(arguments: list[str], shape: Shape) -> Work | None:
    traits, rows, _columns, _warps, K, N, _activation, has_residual, out = arguments
    return _gemm(traits, K, N, has_residual, out, shape) if shape.tokens <= int(rows) else None


def _attention_of(traits: str, nh: str, hs: str, shape: Shape) -> Work:
    """qkv is read and the result written, 3 C + C elements a token; the cache is read, a key and a value each."""
    C = int(nh) * int(hs)
    return Work(4 * C * shape.pairs, BYTES[traits] * C * (4 * shape.tokens + 2 * shape.B * shape.context))


def _causal_attention(arguments: list[str], shape: Shape) -> Work:
    traits, nh, hs = arguments
    return _attention_of(traits, nh, hs, shape)


def _append_attention(arguments: list[str], shape: Shape) -> Work | None:
    traits, nh, hs, *_ = arguments
    return _attention_of(traits, nh, hs, shape) if shape.T > 1 else None


def _decode_split_kv(arguments: list[str], shape: Shape) -> Work | None:
    traits, nh, hs, _length = arguments
    return _attention_of(traits, nh, hs, shape) if shape.T == 1 else None


def _merge_states(arguments: list[str], shape: Shape) -> Work | None:
    traits, nh, hs = arguments
    return Work(0, BYTES[traits] * int(nh) * int(hs) * shape.B) if shape.T == 1 else None


def _append_kv(arguments: list[str], shape: Shape) -> Work | None:
    nh, hs, _length, _threads = arguments
    return Work(0, 8 * int(nh) * int(hs) * shape.tokens) if shape.T > 1 else None  # 16-bit k and v, read and written


def _layer_norm(arguments: list[str], shape: Shape) -> Work:
    C, _warps, out = arguments
    return Work(0, int(C) * (8 + shape.tokens * (4 + (4 if out == "StoreF32" else 2))))


def _embed(arguments: list[str], shape: Shape) -> Work:
    return Work(0, 12 * int(arguments[0]) * shape.tokens)


_KERNELS: dict[str, Callable[[list[str], Shape], Work | None]] = {
    "linear": _linear,
    "skinny_gemm": _skinny_gemm,
    "causal_attention": _causal_attention,
    "append_attention": _append_attention,
    "decode_split_kv": _decode_split_kv,
    "merge_states": _merge_states,
    "append_kv": _append_kv,
    "layer_norm": _layer_norm,
    "embed": _embed,
    "sample": lambda arguments, shape: Work(0, 4 * int(arguments[0]) * shape.B),
}
