"""Say how the model in an ONNX file is called, whoever wrote it: its inputs, what they mean, and what to give them.

This is data, without ONNX: `export.interface` reads it from a file.
"""

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from operator import add, mul, sub
from typing import Any

import ml_dtypes
import numpy as np

from gpt.cli import UserError

Dims = tuple[int | str, ...]
# What an input other than the ids is: which tokens are to be seen, their positions, the keys and values before them.
SEEN, COUNTED, PAST, ZEROS = "mask", "positions", "past", "zeros"


@dataclass(frozen=True)
class Port:
    """One input or output. dims: numbers, names of sizes, and a name of its own, as `ids.0`, for each that has none."""

    name: str
    dtype: str
    dims: Dims


@dataclass(frozen=True)
class Signature:
    """Says how a model is called.

    inputs, outputs: in the file's order. ids, logits: the names of the input of token ids and of the output of logits;
    None where there is none that could be told. roles: what every other input is, by its name: `mask`, `positions`,
    `past`, `zeros`; an input that nobody knows is not in it. presents: for each past the output that holds it longer by
    the new tokens. vocab_size: the rows of the table that the ids look up, None if no table is found. longest: the
    most tokens, with those of the past, that its positions go up to; None where nothing says. limits: the most that
    sizes, or sums and products of them, may be for the file to have a result, as {"P + T": 64}.
    """

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    ids: str | None
    logits: str | None
    roles: dict[str, str]
    presents: dict[str, str]
    vocab_size: int | None
    longest: int | None
    limits: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Signature":
        """Return the signature that `to_json` described."""
        ports = {
            name: tuple(Port(each["name"], each["dtype"], tuple(each["dims"])) for each in found[name])
            for name in ("inputs", "outputs")
        }
        return cls(**dict(found) | ports)

    def input(self, name: str) -> Port:
        """Return the input of that name."""
        return next(port for port in self.inputs if port.name == name)

    @property
    def unknown(self) -> tuple[str, ...]:
        """The inputs that nobody knows what to give."""
        return tuple(port.name for port in self.inputs if port.name != self.ids and port.name not in self.roles)

    @property
    def past(self) -> tuple[str, ...]:
        """The inputs that hold keys and values of earlier tokens."""
        return tuple(name for name, role in self.roles.items() if role == PAST)

    @property
    def plain(self) -> tuple[str, ...]:
        """The inputs that a call without padding gives what the ids' shape already says: masks and positions."""
        return tuple(name for name, role in self.roles.items() if role in (SEEN, COUNTED, ZEROS))

    def length_axis(self, name: str) -> int:
        """Return the axis of a past along which its tokens lie. Raises UserError if its shape does not tell."""
        past = self.input(name).dims
        present = next(port.dims for port in self.outputs if port.name == self.presents[name])
        batch = self.input(self.ids).dims[0] if self.ids else None
        named = [axis for axis, dim in enumerate(past) if isinstance(dim, str) and dim != batch]
        if len(named) > 1 and len(past) == len(present):  # of the sizes with a name, the one that grows
            named = [axis for axis in named if past[axis] != present[axis]]
        if len(named) > 1 and len(past) in (4, 5):
            named = [axis for axis in named if axis == len(past) - 2]
        if len(named) != 1:
            raise UserError(f"input {name} of {list(past)}: its shape does not say along which axis its tokens lie")
        return named[0]

    def feed(self, ids: np.ndarray, past: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return what to give every input for ids int64 [B, T] without padding, after a past; by default an empty one.

        The mask is ones, positions count on from the past, which is handed on as it is. Raises UserError for an
        input that nobody knows, and for ids of another shape than the file's.
        """
        if self.ids is None:
            raise UserError("no input of token ids could be told among its inputs")
        if self.unknown:
            raise UserError(f"input {self.unknown[0]}: nothing is known to give it")
        B, T = ids.shape
        if past is None:
            past = {name: self.empty(name, B) for name in self.past}
        P = next((past[name].shape[self.length_axis(name)] for name in self.past), 0)
        values = {SEEN: np.ones((B, P + T)), COUNTED: np.broadcast_to(np.arange(P, P + T), (B, T)), ZEROS: ids * 0}
        given: dict[str, Any] = {}
        for port in self.inputs:
            role = self.roles.get(port.name)
            if role == PAST:
                given[port.name] = past[port.name]
                continue
            value = ids if role is None else values[role]
            if role == SEEN and len(port.dims) == 2 and port.dims[1] == T:
                value = value[:, -T:]
            if role == COUNTED and len(port.dims) == 1:
                value = value[0]
            value = value.astype(dtype_named(port.dtype))
            check_shape(port, value.shape)
            given[port.name] = value
        return given

    def check_limits(self, given: Mapping[str, Any]) -> None:
        """Raise UserError for inputs that are larger than the file has a result for."""
        sizes: dict[str, int] = {}
        for port in self.inputs:
            for axis, (dim, size) in enumerate(zip(port.dims, given[port.name].shape, strict=True)):
                sizes[_identifier(f"{port.name}.{axis}")] = sizes[_identifier(str(dim))] = int(size)
        for formula, most in self.limits.items():
            if (size := _value(ast.parse(formula, mode="eval").body, sizes)) is not None and size > most:
                raise UserError(f"{formula} is {size}, and the file has a result for at most {most}")

    def empty(self, name: str, B: int) -> np.ndarray:
        """Return a past of no tokens for B sequences. Raises UserError if its shape does not say its other sizes."""
        port, length = self.input(name), self.length_axis(name)
        batch = self.input(self.ids).dims[0] if self.ids else None
        shape = []
        for axis, dim in enumerate(port.dims):
            if axis == length:
                shape.append(0)
            elif isinstance(dim, int):
                shape.append(dim)
            elif dim == batch or axis == (1 if len(port.dims) == 5 else 0):
                shape.append(B)
            else:
                raise UserError(f"input {name}: nothing says how large its dimension {dim!r} is")
        return np.zeros(shape, dtype_named(port.dtype))


def _identifier(name: str) -> str:
    """Return a name as formulas of `Signature.limits` have it."""
    return re.sub(r"\W+", "_", name)


def _value(formula: ast.expr, sizes: Mapping[str, int]) -> int | None:
    """Return the value of a formula of sizes, None if it needs a size that no input has."""
    match formula:
        case ast.Constant(value=int(number)):
            return number
        case ast.Name(id=name):
            return sizes.get(name)
        case ast.BinOp(left=left, op=operator, right=right):
            x, y = _value(left, sizes), _value(right, sizes)
            function = {ast.Add: add, ast.Sub: sub, ast.Mult: mul}[type(operator)]
            return None if x is None or y is None else function(x, y)
    raise ValueError(f"a limit that is no formula: {ast.unparse(formula)}")


def check_shape(port: Port, shape: Sequence[int]) -> None:
    """Raise UserError unless an input can have a shape."""
    same = all(not isinstance(dim, int) or dim == size for dim, size in zip(port.dims, shape, strict=False))
    if len(shape) != len(port.dims) or not same:
        raise UserError(f"input {port.name} of shape {list(shape)}: must be [{', '.join(map(str, port.dims))}]")


def dtype_named(name: str) -> Any:
    """Return numpy's dtype of a name, bfloat16 included."""
    return ml_dtypes.bfloat16 if name == "bfloat16" else np.dtype(name)


def tokens_to_try(signature: Signature, wanted: int) -> int:
    """Return how many tokens to run a model on: `wanted`, or fewer if it takes fewer, or the number that it fixes."""
    dims = signature.input(signature.ids).dims if signature.ids else ()
    if len(dims) == 2 and isinstance(dims[1], int):
        return dims[1]
    return min(wanted, signature.longest or wanted)
