"""What one launch of a kernel of `device/` must at least do, by the arguments in its name."""

import re
from collections.abc import Callable
from dataclasses import dataclass

BYTES = {"Bf16": 2, "Fp16": 2, "Tf32": 4}  # of a number


@dataclass(frozen=True)
class Shape:
    """B sequences of T tokens each, behind `context` others in a cache."""

    B: int
    T: int
    context: int = 0

    @property
    def tokens(self) -> int:
        """Of all sequences, without those in the cache."""
        return self.B * self.T

    @property
    def pairs(self) -> int:
        """Queries and keys that see each other."""
        return self.B * (self.T * self.context + self.T * (self.T + 1) // 2)


@dataclass(frozen=True)
class Work:
    """flops: of products of matrices. bytes: that cross the memory's bus if each is read or written once."""

    flops: int
    bytes: int


def work_of(function: str, shape: Shape) -> Work | None:
    """What a launch of `function`, a kernel's name with its template arguments, does at a shape.

    None for a kernel that is not started at that shape.
    """
    name, arguments = _split(function)
    return _KERNELS[name](arguments, shape)


def _split(function: str) -> tuple[str, list[str]]:
    """`linear<Bf16, Tile<64, 64>, 768>` → linear and its three arguments."""
    name, _, inside = function.removesuffix(">").partition("<")
    return name, [each.strip() for each in re.split(r",(?![^<]*>)", inside)]


def _product(number: str, K: str, N: str, with_addend: str, out: str, shape: Shape) -> Work:
    k, n, M = int(K), int(N), shape.tokens
    out_bytes = 4 if out == "Wide" else BYTES[number]
    addend = 4 * n if with_addend == "true" else 0
    return Work(2 * M * k * n, BYTES[number] * k * n + 4 * n + M * (BYTES[number] * k + out_bytes * n + addend))


def _linear(arguments: list[str], shape: Shape) -> Work:
    number, _tile, K, N, _activation, with_addend, out = arguments
    return _product(number, K, N, with_addend, out, shape)


def _linear_of_few_rows(arguments: list[str], shape: Shape) -> Work | None:
    number, rows, _columns, _warps, K, N, _activation, with_addend, out = arguments
    return _product(number, K, N, with_addend, out, shape) if shape.tokens <= int(rows) else None


def _attention(number: str, nh: str, hs: str, shape: Shape) -> Work:
    """qkv is read, the result written, and what is in the cache read: a key and a value each."""
    C = int(nh) * int(hs)
    return Work(4 * C * shape.pairs, BYTES[number] * C * (4 * shape.tokens + 2 * shape.B * shape.context))


def _attend_to_part(arguments: list[str], shape: Shape) -> Work | None:
    number, nh, hs, _length = arguments
    return _attention(number, nh, hs, shape) if shape.T == 1 else None


def _join_parts(arguments: list[str], shape: Shape) -> Work | None:
    number, nh, hs = arguments
    return Work(0, BYTES[number] * int(nh) * int(hs) * shape.B) if shape.T == 1 else None


def _append_rows(arguments: list[str], shape: Shape) -> Work | None:
    nh, hs, _length, _threads = arguments
    return Work(0, 8 * int(nh) * int(hs) * shape.tokens) if shape.T > 1 else None  # 16 bits, read and written


def _layer_norm(arguments: list[str], shape: Shape) -> Work:
    C, _warps, out = arguments
    return Work(0, int(C) * (8 + shape.tokens * (4 + (4 if out == "Wide" else 2))))


def _embed(arguments: list[str], shape: Shape) -> Work:
    return Work(0, 12 * int(arguments[0]) * shape.tokens)


_KERNELS: dict[str, Callable[[list[str], Shape], Work | None]] = {
    "linear": _linear,
    "linear_of_few_rows": _linear_of_few_rows,
    "causal_attention": lambda arguments, shape: _attention(*arguments, shape),
    "attend_to_cache": lambda arguments, shape: _attention(*arguments[:3], shape) if shape.T > 1 else None,
    "attend_to_part": _attend_to_part,
    "join_parts": _join_parts,
    "append_rows": _append_rows,
    "layer_norm": _layer_norm,
    "embed": _embed,
    "choose": lambda arguments, shape: Work(0, 4 * int(arguments[0]) * shape.B),
}
