"""Says how much of a model's work this project's own kernels do, and which nodes of its file they do not."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import tvm
from tvm import relax

from tvm_frontend.graph import ENTRY, Graph
from tvm_frontend.passes.rewrite import calls

# Kernels whose work is products, by their names without the number that tells equal ones apart.
LINEAR = ("linear", "linear_gelu", "linear_gelu_tanh", "linear_relu", "linear_residual")
MOVES = ("broadcast_to", "concat", "expand_dims", "permute_dims", "reshape", "split", "squeeze", "strided_slice")
KINDS = 4  # kinds of nodes that are named in the line of text
NAMED = 2  # nodes of a kind that are named in the line of text


@dataclass(frozen=True)
class Left:
    """Describes a node that no kernel of this project computes.

    node: its name in the file, which is that of its output, or of the output that it is a part of. operator: Relax's.
    reason: why it was left. flops, bytes: its products, and what it reads of the weights.
    """

    node: str
    operator: str
    reason: str
    flops: float
    bytes: float


@dataclass(frozen=True)
class Coverage:
    """Says which share of a model's work is done by this project's kernels, for one batch of a length.

    flops_share: of the FLOPs in products: linear layers, attention, other products of matrices. bytes_share: of the
    bytes of weights that are read. left: the nodes with a part in either that are not in such kernels, the largest
    first. elementwise: the other operators that TVM's own code computes, and how often. batch, tokens: for which the
    work was counted.
    """

    flops_share: float
    bytes_share: float
    left: list[Left]
    elementwise: dict[str, int]
    batch: int
    tokens: int

    def to_json(self) -> dict[str, Any]:
        """Give the fields as plain values, for an artifact's description."""
        return {
            "flops_share": self.flops_share,
            "bytes_share": self.bytes_share,
            "left": [vars(each) for each in self.left],
            "elementwise": self.elementwise,
            "batch": self.batch,
            "tokens": self.tokens,
        }

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "Coverage":
        """Read what `to_json` gave."""
        return cls(**saved | {"left": [Left(**each) for each in saved["left"]]})

    def __str__(self) -> str:
        """Give one line: the shares, and the largest nodes that are left."""
        said = (
            f"{_percent(self.flops_share)} of the FLOPs and {_percent(self.bytes_share)} of the weights' bytes are in "
            "this project's kernels"
        )
        if not self.left:
            return said
        groups: dict[tuple[str, str], list[str]] = {}
        for each in self.left:
            nodes = groups.setdefault((each.operator, each.reason), [])
            nodes += [each.node] if each.node not in nodes else []
        named = [f"{operator} {_listed(nodes)} ({reason})" for (operator, reason), nodes in groups.items()]
        rest = len(named) - KINDS
        more = [f"and {rest} smaller kind{'s' if rest > 1 else ''} of nodes"] if rest > 0 else []
        return f"{said}; not: {', '.join(named[:KINDS] + more)}"


def _listed(names: list[str]) -> str:
    """List the first names, and say how many more there are."""
    more = [f"and {len(names) - NAMED} more"] if len(names) > NAMED else []
    return ", ".join(names[:NAMED] + more)


def _percent(share: float) -> str:
    """Format a share so that only a whole one is 100 %."""
    return "100 %" if share == 1 else f"{min(share, 0.999):.1%}".replace("%", " %")


def coverage_of(graph: Graph, batch: int = 1, tokens: int = 128, others: int | None = None) -> Coverage:
    """Count the work of forward by who does it, in a graph after the rewrites and before `bundle_weights`.

    batch, tokens: the sizes B and T of the first input [B, T], where it leaves them open. others: any other size that
    the file leaves open, as the length of a past; `tokens` if it is None.
    """
    function = graph.module[ENTRY]
    reader = _Reader(graph, function, _sizes(function, batch, tokens, tokens if others is None else others))
    found = list(reader.nodes())
    totals = [sum(getattr(node, unit) for node, _ in found) for unit in ("flops", "bytes")]
    ours = [sum(getattr(node, unit) for node, is_ours in found if is_ours) for unit in ("flops", "bytes")]
    shares = [part / total if total else 1.0 for part, total in zip(ours, totals, strict=True)]
    left = [node for node, is_ours in found if not is_ours and (node.flops or node.bytes)]
    left.sort(key=lambda node: (-node.flops, -node.bytes))
    rest = Counter(node.operator for node, is_ours in found if not (is_ours or node.flops or node.bytes))
    elementwise = {name: count for name, count in rest.most_common() if name not in MOVES}
    return Coverage(shares[0], shares[1], left, elementwise, batch, tokens)


def _sizes(function: relax.Function, batch: int, tokens: int, others: int) -> dict[tvm.tirx.Var, int]:
    """Give a number for each size that the inputs leave open."""
    first, *rest = function.params[: int(function.attrs["num_input"])]
    numbers = dict(zip(first.ty.shape.values, (batch, tokens), strict=False))
    sizes = {dim: number for dim, number in numbers.items() if isinstance(dim, tvm.tirx.Var)}
    for param in rest:
        for dim in param.ty.shape.values:
            if isinstance(dim, tvm.tirx.Var):
                sizes.setdefault(dim, others)
    return sizes


@dataclass
class _Reader:
    """Reads the nodes of a graph, with a number for each size that it leaves open."""

    graph: Graph
    function: relax.Function
    sizes: dict[tvm.tirx.Var, int]
    _analyzer: tvm.sym.Analyzer = field(default_factory=tvm.sym.Analyzer)
    _bound: dict[relax.Var, relax.Expr] = field(default_factory=dict)
    _reader_of: dict[relax.Var, relax.Var] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for size, number in self.sizes.items():
            self._analyzer.bind(size, tvm.tirx.const(number, "int64"))
        weights = self.function.params[int(self.function.attrs["num_input"]) :]
        self._weights = set(weights)
        for block in self.function.body.blocks:
            for binding in block.bindings:
                self._bound[binding.var] = binding.value
                for each in relax.analysis.free_vars(binding.value):
                    self._reader_of.setdefault(each, binding.var)

    def nodes(self) -> Iterator[tuple[Left, bool]]:
        """List the calls, each with whether it is a kernel of this project."""
        for var, value in self._bound.items():
            if isinstance(value, relax.Call):
                kernel = self._kernel(value)
                is_ours = kernel is not None and bool(kernel.attrs.get("tirx.is_scheduled", False))
                name = self._operator(value)
                flops = self._flops_of_kernel(name, var, value) if kernel is not None else self._flops(value)
                weights = self._bytes_of_weights(name, var, value)
                yield Left(self._node(var), name, self._reason(var, value), flops, weights), is_ours

    def shape(self, expr: relax.Expr) -> list[int]:
        """Give a tensor's shape in numbers; a size that follows from none of the inputs counts as 1."""
        numbers = [self._analyzer.simplify(dim) for dim in expr.ty.shape.values]
        return [int(number) if isinstance(number, tvm.tirx.IntImm) else 1 for number in numbers]

    def _kernel(self, value: relax.Call) -> tvm.tirx.PrimFunc | None:
        if isinstance(value.args[0] if value.args else None, tvm.ir.GlobalVar):
            return self.graph.module[value.args[0]]
        return None

    def _operator(self, value: relax.Call) -> str:
        if self._kernel(value) is not None:
            return value.args[0].name_hint.rstrip("0123456789")
        return getattr(value.op, "name", "call").removeprefix("relax.").removeprefix("nn.")

    def _flops(self, value: relax.Call) -> float:
        """Count the FLOPs of a product that is an operator of Relax; 0 for other operators."""
        if calls(value, "matmul"):
            left, right = (self.shape(each) for each in value.args)
            outer = left[:-2] if prod(left[:-2]) >= prod(right[:-2]) else right[:-2]
            return 2 * prod(outer) * prod(left[-2:]) * (right[-1] if len(right) > 1 else 1)
        if calls(value, "nn.attention"):
            (B, T, nh, hs), (_, S, *_), (*_, hs_v) = (self.shape(each) for each in value.args[:3])
            seen = (T + 1) / 2 if str(value.attrs.causal_mask) == "TopLeft" else S
            return 2 * B * nh * T * seen * (hs + hs_v)
        if calls(value, "einsum"):
            operands = value.args[0].fields
            letters = str(value.attrs.subscripts).replace(" ", "").split("->")[0].split(",")
            sizes = {
                letter: size
                for names, each in zip(letters, operands, strict=True)
                for letter, size in zip(names, self.shape(each), strict=False)
            }
            return 2 * prod(sizes.values())
        return 0

    def _flops_of_kernel(self, name: str, var: relax.Var, value: relax.Call) -> float:
        """Count the FLOPs of a kernel's products; 0 for one that has none, as TVM's for an elementwise operator."""
        arguments = value.args[1].fields
        if name in LINEAR:
            return 2 * prod(self.shape(arguments[0])) * self.shape(var)[-1]
        if name == "causal_attention":
            B, T, width = self.shape(arguments[0])
            return 2 * B * T * (T + 1) * (width // 3)
        if name == "cached_attention":
            B, T, width = self.shape(arguments[0])
            return 4 * B * T * self.shape(arguments[2])[2] * (width // 3)
        return 0

    def _bytes_of_weights(self, name: str, var: relax.Var, value: relax.Call) -> float:
        """Count the bytes of weights that a call reads: rows alone of a table that it looks up."""
        total = 0
        for each in relax.analysis.free_vars(value):
            if each in self._weights:
                shape = self.shape(each)
                if name in ("embedding", "take") and len(shape) > 1:
                    shape = [min(shape[0], prod(self.shape(var)[:-1])), *shape[1:]]
                total += prod(shape) * (tvm.DataType(str(each.ty.dtype)).bits // 8)
        return total

    def _node(self, var: relax.Var) -> str:
        """Name the node of the file that a value is of: its own name, or that of the first value made of it."""
        seen = var
        while _is_unnamed(seen) and seen in self._reader_of:
            seen = self._reader_of[seen]
        return "that gives the output" if _is_unnamed(seen) else seen.name

    def _reason(self, var: relax.Var, value: relax.Call) -> str:
        """Say why no kernel of this project was put in the place of a call."""
        if calls(value, "nn.attention"):
            kinds = {"TopLeft": "causal attention", "BottomRight": "attention to a past"}
            kind = kinds.get(str(value.attrs.causal_mask), "attention without a mask")
            if kind != "causal attention" or self._is_of_thirds(value):
                return f"{kind} that no kernel takes"
            return "attention whose q, k and v are no thirds of one linear layer"
        if calls(value, "matmul"):
            factors = [self._bound.get(each, each) for each in value.args]
            factors = [each.args[0] if calls(each, "permute_dims") else each for each in factors]
            if weights := [each for each in factors if isinstance(each, relax.Var) and each in self._weights]:
                is_matrix = len(weights[0].ty.shape.values) == 2
                return (
                    "a linear layer that no kernel takes" if is_matrix else "a product with a weight that is no matrix"
                )
            if self._leads_to_softmax(var) or any(self._comes_from_softmax(each) for each in value.args):
                return "attention with a mask that is not the causal one alone"
            return "a product of two values that are computed"
        if calls(value, "take"):
            return "a table that is looked up on its own"
        return "no kernel for it"

    def _is_of_thirds(self, attention: relax.Call) -> bool:
        heads: list[Any] = [self._bound.get(each) for each in attention.args[:3]]
        parts = [self._bound.get(each.args[0]) for each in heads if calls(each, "reshape")]
        return len(parts) == 3 and all(isinstance(part, relax.TupleGetItem) for part in parts)

    def _leads_to_softmax(self, var: relax.Var) -> bool:
        for _ in range(16):  # the scale, a cap, masks, a change of type: never many
            var = self._reader_of.get(var)
            if var is None:
                return False
            value = self._bound[var]
            if calls(value, "nn.softmax"):
                return True
            if calls(value, "matmul"):
                return False
        return False

    def _comes_from_softmax(self, expr: relax.Expr) -> bool:
        for _ in range(16):
            value = self._bound.get(expr) if isinstance(expr, relax.Var) else None
            if not isinstance(value, relax.Call) or calls(value, "matmul"):
                return False
            if calls(value, "nn.softmax"):
                return True
            arguments = value.args[1].fields if self._kernel(value) is not None else value.args
            expr = next((each for each in arguments if isinstance(each, relax.Var)), None)
        return False


def _is_unnamed(var: relax.Var) -> bool:
    """Tell if a variable has a name of the builder's own: lv, lv1, gv, …"""
    return var.name.rstrip("0123456789") in ("lv", "gv")
