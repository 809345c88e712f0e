"""Converts attention, and the writing of rows into a cache that attention reads.

Where attention is plainly causal, and the queries are the last of the keys, it becomes one operator of Relax, for which
there is a kernel. Attention of every other kind becomes a product, a softmax over the scores that are seen, and a
product.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx
import tvm
from tvm import relax, te
from tvm.relax import op

from gpt.cli import UserError
from tvm_frontend.frontends.onnx.operators.context import Converter, Reading, Value, refuse_unless
from tvm_frontend.frontends.onnx.operators.masks import as_added, is_causal, same_sizes
from tvm_frontend.frontends.onnx.operators.symbolic import is_number, is_one, is_zero, simplified

INPUTS = ("q", "k", "v", "mask", "past_key", "past_value", "filled")  # of ai.onnx Attention, in its order
FLOATS = (1, 10, 11, 16)  # ONNX's numbers of float, float16, double and bfloat16
# The kernels of attention to a cache, by which `passes.fuse_cached_attention` knows it.
SCORES_UP_TO, WEIGHTS_UP_TO = "scores_up_to", "weights_up_to"


@dataclass(frozen=True, eq=False)
class Seen:
    """Says which keys each query sees, and what is added to its scores.

    mask: true for keys that are seen, or numbers that are added; it broadcasts to [B, nh, T, S], and keys behind its
    last one are hidden. filled: integers [B], the number of keys that each sequence has; those behind them are hidden.
    first: the position of the first query among the keys; None makes queries the last of the keys that are filled.
    causal: hides the keys behind a query. left, right: the number of keys before and behind a query that it sees; -1
    stands for all.
    """

    mask: relax.Expr | None = None
    filled: relax.Expr | None = None
    first: Any = 0
    causal: bool = False
    left: int = -1
    right: int = -1

    @property
    def is_all(self) -> bool:
        """Tell if every query sees every key, and nothing is added."""
        return not self.causal and self.left < 0 and self.right < 0 and self.mask is None and self.filled is None

    @property
    def is_causal_alone(self) -> bool:
        """Tell if a query's position alone says which keys it sees: those up to itself."""
        return self.causal and self.left < 0 and self.mask is None

    @property
    def may_be_none(self) -> bool:
        """Tell if there may be queries that see no key."""
        return self.mask is not None or self.filled is not None or self.left >= 0 or self.right >= 0


@dataclass(frozen=True)
class Attended:
    """Holds what attention gives: y [B, nh, T, hs_v], and the stages of its scores [B, nh, T, S], if they were wanted.

    scores: scale · q · kᵀ; capped: these with the soft cap; masked: these with the mask, -inf for a hidden key;
    weights: their softmax.
    """

    y: relax.Expr
    scores: relax.Expr | None = None
    capped: relax.Expr | None = None
    masked: relax.Expr | None = None
    weights: relax.Expr | None = None


def attend(
    reading: Reading,
    q: relax.Expr,
    k: relax.Expr,
    v: relax.Expr,
    seen: Seen,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    stages: bool = False,
) -> Attended:
    """Attend with q [B, nh, T, hs] to k [B, nh_kv, S, hs] and v [B, nh_kv, S, hs_v], nh being a multiple of nh_kv.

    Head h of the queries reads head h // (nh / nh_kv) of keys and values. A query that sees no key gives a row of 0.
    scale: 1/√hs if it is None. softcap: scores become softcap · tanh(scores / softcap), unless it is 0. stages: whether
    the scores are wanted too. Raises UserError if the heads do not fit.
    """
    (B, nh, T, hs), (_, nh_kv, S, _), (*_, hs_v) = (each.ty.shape.values for each in (q, k, v))
    if not all(map(is_number, (nh, nh_kv, hs, hs_v))) or int(nh) % int(nh_kv):
        nh, nh_kv = (getattr(number, "value", number) for number in (nh, nh_kv))
        raise UserError(f"{nh} heads of queries for {nh_kv} of keys are not supported, only a multiple")
    scale = int(hs) ** -0.5 if scale is None else scale
    group = int(nh) // int(nh_kv)
    emit = reading.builder.emit
    to_the_end = seen.filled is None and seen.first is not None and same_sizes([seen.first + T, S])
    if seen.is_causal_alone and to_the_end and int(hs) == int(hs_v) and group == 1 and softcap == 0 and not stages:
        q, k, v = (emit(op.permute_dims(each, [0, 2, 1, 3])) for each in (q, k, v))
        corner = "TopLeft" if is_zero(seen.first) else "BottomRight"
        y = op.nn.attention(q, k, v, scale=tvm.tirx.const(scale, "float32"), causal_mask=corner)
        return Attended(op.permute_dims(emit(y), [0, 2, 1, 3]))

    rows = simplified(group * T)  # heads that share keys are rows of one product
    q = emit(op.multiply(q, relax.const(scale, q.ty.dtype)))
    q = q if group == 1 else emit(op.reshape(q, [B, nh_kv, rows, hs]))
    scores = emit(op.matmul(q, emit(op.permute_dims(k, [0, 1, 3, 2]))))
    scores = scores if group == 1 else emit(op.reshape(scores, [B, nh, T, S]))
    capped = scores
    if softcap:
        cap = relax.const(softcap, q.ty.dtype)
        capped = emit(op.multiply(emit(op.tanh(emit(op.divide(scores, cap)))), cap))
    weights = emit(op.nn.softmax(_masked(reading, capped, seen), axis=-1))
    if seen.may_be_none:
        weights = _of_seen(reading, weights, seen)
    y = emit(op.matmul(weights if group == 1 else emit(op.reshape(weights, [B, nh_kv, rows, S])), v))
    y = y if group == 1 else op.reshape(y, [B, nh, T, hs_v])
    if not stages:
        return Attended(y)
    return Attended(y, scores, capped, _masked(reading, capped, seen, hidden=float("-inf")), weights)


def to_heads(reading: Reading, x: relax.Expr, heads: int) -> relax.Expr:
    """Turn [B, T, nh · hs] into [B, nh, T, hs]. Raises UserError if the heads do not fit."""
    B, T, C = x.ty.shape.values
    if not is_number(C) or heads < 1 or int(C) % heads:
        C = getattr(C, "value", C)
        raise UserError(f"{heads} heads of {C} channels together are not supported, only heads of one size")
    x = reading.builder.emit(op.reshape(x, [B, T, heads, int(C) // heads]))
    return reading.builder.emit(op.permute_dims(x, [0, 2, 1, 3]))


def from_heads(reading: Reading, x: relax.Expr) -> relax.Expr:
    """Turn [B, nh, T, hs] into [B, T, nh · hs]."""
    x = reading.emit(x)
    B, nh, T, hs = x.ty.shape.values
    return op.reshape(reading.emit(op.permute_dims(x, [0, 2, 1, 3])), [B, T, int(nh) * int(hs)])


def _masked(reading: Reading, scores: relax.Expr, seen: Seen, hidden: float | None = None) -> relax.Expr:
    """Add the mask to scores [B, nh, T, S]; `hidden`, or the lowest number if it is None, is the score of hidden keys.

    The lowest number and not -inf, so that softmax gives numbers also for a query that sees no key.
    """
    if seen.is_all:
        return scores
    dtype = str(scores.ty.dtype)
    lowest = tvm.tirx.min_value(dtype) if hidden is None else tvm.tirx.const(hidden, dtype)

    def masked(score: Any, is_seen: Any, added: Any) -> Any:
        return te.if_then_else(is_seen, score if added is None else score + added, lowest)

    up_to = seen.is_causal_alone and seen.first is None and hidden is None
    return _by_position(reading, scores, seen, masked, SCORES_UP_TO if up_to else "masked_scores")


def _of_seen(reading: Reading, weights: relax.Expr, seen: Seen) -> relax.Expr:
    """Give weights [B, nh, T, S] with 0 for hidden keys, which have another weight where a query sees none."""
    nothing = tvm.tirx.const(0, str(weights.ty.dtype))
    up_to = seen.is_causal_alone and seen.first is None
    return _by_position(
        reading,
        weights,
        seen,
        lambda weight, is_seen, added: tvm.tirx.Select(is_seen, weight, nothing),
        WEIGHTS_UP_TO if up_to else "seen_weights",
    )


def _by_position(reading: Reading, x: relax.Expr, seen: Seen, element: Callable[..., Any], name: str) -> relax.Expr:
    """Compute x [B, nh, T, S] anew by a kernel of that name.

    element: takes a value of x, whether the key is seen, and the number that is added, None if the mask has none.
    """
    tensors = {key: value for key, value in (("mask", seen.mask), ("filled", seen.filled)) if value is not None}
    first = None if seen.first is None else simplified(seen.first)
    sizes = [] if first is None or is_number(first) else list(tvm.tirx.analysis.undefined_vars(first, []))

    def kernel(x: te.Tensor, *passed: Any) -> te.Tensor:
        T, S = x.shape[2:]
        given: dict[str, Any] = dict(zip(tensors, passed, strict=False))
        mask, filled, start = given.get("mask"), given.get("filled"), first
        for size, value in zip(sizes, passed[len(given) :], strict=True):  # a kernel knows only its arguments' sizes
            start = tvm.tirx.Let(size, value, start)

        def at(b: Any, h: Any, t: Any, s: Any) -> Any:
            query = t + (filled[b] - T if filled is not None and start is None else start)
            conditions = [s <= query] if seen.causal else []
            conditions += [s >= query - seen.left] if seen.left >= 0 else []
            conditions += [s <= query + seen.right] if seen.right >= 0 else []
            conditions += [s < filled[b]] if filled is not None and not (seen.causal and start is None) else []
            if mask is None:
                return element(x(b, h, t, s), te.all(*conditions), None)
            conditions += [] if same_sizes([mask.shape[-1], S]) else [s < mask.shape[-1]]
            value = _of_mask(mask, b, h, t, s)
            if mask.dtype == "bool":
                return element(x(b, h, t, s), te.all(*conditions, value), None)
            return element(
                x(b, h, t, s), te.all(*conditions, value != tvm.tirx.const(float("-inf"), mask.dtype)), value
            )

        return te.compute(x.shape, at, name=name)

    return reading.builder.call_te(kernel, x, *tensors.values(), *sizes, primfunc_name_hint=name)


def _of_mask(mask: te.Tensor, *position: Any) -> Any:
    """Give the element of a mask at [b, h, t, s], of which it has the last ones, or 0 where its size is 1.

    A size that is known only when the model runs may turn out to be 1 too.
    """
    rank = len(mask.shape)
    sizes = zip(position[-rank:], mask.shape, strict=True)
    return mask(*(0 if is_one(size) else te.min(index, size - 1) for index, size in sizes))


def _attention(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value | tuple[Value, ...]:
    """Convert ai.onnx Attention of q, k, v, each [B, nh, T, hs] or [B, T, nh · hs]."""
    given = {key: name for key, name in zip(INPUTS, node.input, strict=False) if name}
    if attributes.get("softmax_precision", 1) not in FLOATS:
        raise UserError(f"softmax_precision={attributes['softmax_precision']} is not supported, only floats")
    if ("past_key" in given) != ("past_value" in given) or ("past_key" in given and "filled" in given):
        raise UserError("past_key is not supported without past_value, nor beside nonpad_kv_seqlen")
    q, k, v = (reading.tensor(given[key]) for key in "qkv")
    ranks = [len(each.ty.shape.values) for each in (q, k, v)]
    if ranks == [3, 3, 3]:
        heads = [attributes.get(f"{of}_num_heads", 0) for of in ("q", "kv", "kv")]
        q, k, v = (to_heads(reading, each, number) for each, number in zip((q, k, v), heads, strict=True))
    elif ranks != [4, 4, 4]:
        raise UserError(f"q, k, v of {', '.join(map(str, ranks))} dimensions are not supported, only all of 3 or of 4")
    first, causal, mask = 0, bool(attributes.get("is_causal", 0)), None
    if "past_key" in given:
        pasts = [reading.tensor(given[key]) for key in ("past_key", "past_value")]
        first = pasts[0].ty.shape.values[2]
        k, v = (reading.emit(op.concat([past, new], axis=2)) for past, new in zip(pasts, (k, v), strict=True))
    left, right = (attributes.get(f"{side}_window_size", -1) for side in ("left", "right"))
    if "mask" in given:
        formula = reading.indexed(given["mask"])
        shape = [*q.ty.shape.values[:3], k.ty.shape.values[2]]
        before = simplified(shape[3] - shape[2])  # the first query's position, for the mask
        agree = same_sizes([first, before]) or not (causal or max(left, right) >= 0)
        if formula and agree and "filled" not in given and is_causal(as_added(formula[0]), shape):
            causal, first = True, before
        else:
            mask = reading.tensor(given["mask"])
    filled = reading.tensor(given["filled"]) if "filled" in given else None
    found = attend(
        reading,
        q,
        k,
        v,
        Seen(mask, filled, first if filled is None else None, causal, left, right),
        scale=attributes.get("scale"),
        softcap=attributes.get("softcap", 0.0),
        stages=len(node.output) > 3,
    )
    y = from_heads(reading, found.y) if ranks[0] == 3 else found.y
    stage = (found.scores, found.capped, found.masked, found.weights)[attributes.get("qk_matmul_output_mode", 0)]
    return (y, k, v, stage)[: len(node.output)]


def _tensor_scatter(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    """Convert ai.onnx TensorScatter: write rows [B, nh, T, hs] into cache [B, nh, S, hs] from pos[b] on."""
    refuse_unless({"axis": -2} | attributes, mode=b"linear")
    cache, rows, pos = (reading.tensor(name) for name in node.input)
    if len(cache.ty.shape.values) != 4 or attributes.get("axis", -2) not in (-2, 2):
        raise UserError("only axis 2 of [B, nh, S, hs] is supported")
    return scatter_rows(reading, cache, rows, pos)


def scatter_rows(reading: Reading, cache: relax.Expr, rows: relax.Expr, pos: relax.Expr) -> relax.Expr:
    """Write rows [B, nh, T, hs] into a cache [B, nh, S, hs], of sequence b from row pos[b] on."""

    def tensor_scatter(cache: te.Tensor, rows: te.Tensor, pos: te.Tensor) -> te.Tensor:
        T = rows.shape[2]
        return te.compute(
            cache.shape,
            lambda b, h, s, d: te.if_then_else(
                te.all(s >= pos[b], s < pos[b] + T),
                rows[b, h, te.max(te.min(s - pos[b], T - 1), 0), d],
                cache[b, h, s, d],
            ),
            name="tensor_scatter",
        )

    return reading.builder.emit_te(tensor_scatter, cache, rows, pos, primfunc_name_hint="tensor_scatter")


CONVERTERS: dict[str, Converter] = {
    "Attention": _attention,
    "TensorScatter": _tensor_scatter,
}
