"""Converts operators of com.microsoft, which ONNX Runtime's optimizer and its model builder write.

What each computes is what ONNX Runtime's CPU kernels compute. Attention without a mask of its own, without a past and
with `unidirectional` becomes Relax's causal attention, which has a kernel; every other form is spelled out.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import tvm
from tvm import relax, te
from tvm.relax import op

from gpt.cli import UserError
from tvm_frontend.frontends.onnx.operators import layers
from tvm_frontend.frontends.onnx.operators.context import Converter, Reading, Value, refuse_unless
from tvm_frontend.frontends.onnx.operators.symbolic import (
    Indexed,
    equal,
    expression,
    is_number,
    is_one,
    position_symbols,
    simplified,
)

SWAP = [0, 2, 1, 3]  # [B, T, nh, hs] to [B, nh, T, hs], and back
Element = Callable[..., tvm.ir.Expr]


def inputs_of(node: onnx.NodeProto, *names: str) -> dict[str, str]:
    """Name the inputs of a node that are given: what each is, and its name in the file."""
    return {name: given for name, given in zip(names, node.input, strict=False) if given}


def outputs_of(node: onnx.NodeProto, **results: relax.Expr | None) -> Value | tuple[Value, ...]:
    """Give the results that a node names. Raises UserError if it names one that is None, or more than there are."""
    if len(node.output) > len(results):
        raise UserError(f"outputs {', '.join(node.output)} are not supported, only {', '.join(results)}")
    found: list[Value] = []
    for name, (what, result) in zip(node.output, results.items(), strict=False):
        if result is None and name:
            raise UserError(f"output {name!r}, the {what}, is not supported")
        found.append(found[0] if result is None else result)  # an output without a name is read by nobody
    return found[0] if len(found) == 1 else tuple(found)


def refuse_inputs(given: dict[str, str], *names: str) -> None:
    """Raise UserError if one of these inputs is given."""
    for name in names:
        if name in given:
            raise UserError(f"input {name} ({given[name]!r}) is not supported")


def number(attributes: dict[str, Any], name: str) -> int:
    """Give an attribute that must be a positive integer."""
    found = int(attributes.get(name, 0))
    if found < 1:
        raise UserError(f"attribute {name}={found} is not supported, only numbers of at least 1")
    return found


def halves(reading: Reading, x: relax.Expr) -> list[relax.Expr]:
    """Give x[0] and x[1] of a tensor x [2, ...]."""
    pieces = reading.emit(op.split(x, 2, axis=0))
    return [reading.emit(op.squeeze(reading.emit(relax.TupleGetItem(pieces, i)), [0])) for i in range(2)]


def heads_of(reading: Reading, x: relax.Expr, heads: int, what: str) -> relax.Expr:
    """Divide x [B, T, heads · hs] in heads: [B, T, heads, hs]."""
    B, T, C = x.ty.shape.values
    if not is_number(C) or int(C) % heads:
        raise UserError(
            f"{what} of shape {sizes_of([B, T, C])} is not supported, only [B, T, C] whose C is divisible by {heads}"
        )
    return reading.emit(op.reshape(x, [B, T, heads, int(C) // heads]))


def merged(reading: Reading, y: relax.Expr) -> relax.Expr:
    """Join the heads of y [B, T, nh, hs]: [B, T, nh · hs]."""
    B, T, nh, hs = y.ty.shape.values
    return reading.emit(op.reshape(y, [B, T, int(nh) * int(hs)]))


def scale_of(attributes: dict[str, Any], hs: int) -> float:
    """Give the factor of attention's scores: ONNX Runtime takes a scale of 0 for one that is not given."""
    return float(attributes.get("scale", 0.0)) or hs**-0.5


@dataclass
class Scores:
    """Says what becomes of scores [B, nh, T, S] before softmax: they are capped, added to, and hidden.

    added: numbers that are added, each a tensor and its element at [b, h, t, s]. hidden: tells if [b, h, t, s] is not
    seen, from the shape of the scores and the tensors, or None. sizes: of the file, which `hidden` is passed.
    """

    scale: float
    softcap: float = 0.0
    added: list[tuple[relax.Expr, Callable[[te.Tensor], Element]]] = field(default_factory=list)
    hidden: Callable[..., tvm.ir.Expr] | None = None
    of_hidden: list[relax.Expr] = field(default_factory=list)
    sizes: list[Any] = field(default_factory=list)

    def add_bias(self, reading: Reading, name: str, sizes: list[Any]) -> None:
        """Add a value that broadcasts to sizes [B, nh, T, S]."""
        bias = with_shape(reading, reading.tensor(name), sizes)
        if bias is None:
            found, wanted = sizes_of(reading.shape(name)), sizes_of(sizes)
            raise UserError(f"attention_bias {name!r} of shape {found} is not supported, only {wanted}")

        def element(x: te.Tensor) -> Element:
            def at(*index: Any) -> tvm.ir.Expr:
                value = x(*(0 if is_one(size) else i for size, i in zip(x.shape, index, strict=True)))
                # A cache may be longer than what is in it, and the bias.
                is_there = expression(index[3], "int64") < expression(x.shape[3], "int64")
                return value if is_one(x.shape[3]) else te.if_then_else(is_there, value, tvm.tirx.const(0.0, "float32"))

            return at

        self.added.append((bias, element))

    @property
    def are_plain(self) -> bool:
        return not (self.softcap or self.added)


def attend(reading: Reading, q: relax.Expr, k: relax.Expr, v: relax.Expr, how: Scores) -> relax.Expr:
    """Attend with q [B, T, nh, hs] to k [B, nh, S, hs] and v [B, nh, S, hv]: [B, T, nh, hv]."""
    emit = reading.emit
    count = len(how.added)

    def change_scores(scores: te.Tensor, *rest: Any) -> te.Tensor:
        added = [element(x) for (_, element), x in zip(how.added, rest, strict=False)]
        more = rest[count:]

        def at(*index: Any) -> tvm.ir.Expr:
            value = scores(*index) * tvm.tirx.const(how.scale, "float32")
            if how.softcap:
                cap = tvm.tirx.const(how.softcap, "float32")
                value = cap * te.tanh(value / cap)
            for element in added:
                value = value + element(*index)
            if how.hidden is None:
                return value
            return tvm.tirx.Select(how.hidden(scores.shape, *more)(*index), tvm.tirx.min_value("float32"), value)

        return te.compute(scores.shape, at, name="change_scores")

    scores = emit(op.matmul(emit(op.permute_dims(q, SWAP)), emit(op.permute_dims(k, [0, 1, 3, 2]))))
    arguments = [scores, *(x for x, _ in how.added), *how.of_hidden, *how.sizes]
    changed = reading.builder.emit_te(change_scores, *arguments, primfunc_name_hint="change_scores")
    y = emit(op.matmul(emit(op.nn.softmax(changed, axis=-1)), v))
    return emit(op.permute_dims(y, SWAP))


def attend_causally(reading: Reading, q: relax.Expr, k: relax.Expr, v: relax.Expr, scale: float) -> relax.Expr:
    """Attend with q [B, T, nh, hs] to the keys k, v [B, T, nh, hs] that are no later: [B, T, nh, hs]."""
    return reading.emit(op.nn.attention(q, k, v, scale=tvm.tirx.const(scale, "float32"), causal_mask="TopLeft"))


def later_keys(aligned_right: bool) -> Callable[..., Element]:
    """Tell which keys are later than a query: the first query is at the first key, or the last at the last.

    ONNX Runtime hides nothing from the last query, even where there are more keys than queries.
    """

    def hidden(shape: list[Any], *_: Any) -> Element:
        before = shape[3] - shape[2] if aligned_right else 0
        return lambda b, h, t, s: te.all(s > before + t, t < shape[2] - 1)

    return hidden


def add_mask(reading: Reading, how: Scores, name: str, sizes: tuple[Any, Any, Any], attributes: dict[str, Any]) -> None:
    """Add the mask of com.microsoft's operators to scores [B, nh, T, S]: `mask_filter_value` where it hides a key.

    It is int32: [B, S] or [B, T, S] of ones for keys that are seen, [B] of numbers of keys, [2B] of those and of
    the first key that is seen. Raises UserError for another. A mask that is known to hide nothing is left out.
    """
    B, T, S = sizes
    shape = reading.shape(name)
    if _shows_all(reading, name, len(shape)):
        return
    mask = reading.tensor(name)
    hidden = tvm.tirx.const(attributes.get("mask_filter_value", -10000.0), "float32")
    nothing = tvm.tirx.const(0.0, "float32")

    def choose(seen: tvm.ir.Expr) -> tvm.ir.Expr:
        return tvm.tirx.Select(seen, nothing, hidden)

    def by_key(x: te.Tensor) -> Element:
        return lambda b, h, t, s: choose(x(0 if is_one(x.shape[0]) else b, s) > 0)

    def by_query(x: te.Tensor) -> Element:
        return lambda b, h, t, s: choose(x(0 if is_one(x.shape[0]) else b, t, s) > 0)

    def by_length(x: te.Tensor) -> Element:
        return lambda b, h, t, s: choose(expression(s, "int64") < expression(x(b), "int64"))

    def by_ends(x: te.Tensor) -> Element:
        def at(b: Any, h: Any, t: Any, s: Any) -> tvm.ir.Expr:
            s = expression(s, "int64")
            end, start = (expression(x(i), "int64") for i in (b, b + tvm.tirx.floordiv(x.shape[0], 2)))
            return choose(te.all(s < end, s >= start))

        return at

    forms: list[tuple[list[Any], Callable[[te.Tensor], Element]]] = [([B, S], by_key), ([B, T, S], by_query)]
    forms += [([size], form) for size, form in ((B, by_length), (2 * B, by_ends)) if equal(shape[0], size)]
    for wanted, form in forms:
        if (checked := with_shape(reading, mask, wanted)) is not None:
            how.added.append((checked, form))
            return
    allowed = ", ".join(map(str, map(sizes_of, ([B, S], [B, T, S], [B], [2 * B]))))
    raise UserError(f"mask {name!r} of shape {sizes_of(shape)} is not supported, only {allowed}")


def with_shape(reading: Reading, x: relax.Expr, wanted: list[Any]) -> relax.Expr | None:
    """Give x if its sizes must be the wanted ones or 1; None if they are known not to be."""
    shape = list(x.ty.shape.values)
    if len(shape) != len(wanted):
        return None
    pairs = [(size, other) for size, other in zip(shape, wanted, strict=True) if not is_one(size)]
    if any(is_number(size) and is_number(other) and int(size) != int(other) for size, other in pairs):
        return None
    for size, other in pairs:
        reading.same_size(size, other)
    return x


def sizes_of(shape: list[Any]) -> list[Any]:
    """Give the sizes of a shape as messages show them."""
    return [simplified(size) for size in shape]


def _shows_all(reading: Reading, name: str, rank: int) -> bool:
    """Tell if a mask of two or three dimensions is known to be greater than 0 everywhere."""
    found = reading.indexed(name)
    if not found or rank < 2:
        return False
    positions, analyzer = position_symbols(found[0].shape)
    return bool(analyzer.can_prove(found[0].element(*positions) > 0))


def joined(reading: Reading, past: relax.Expr, new: relax.Expr) -> relax.Expr:
    """Put new rows [B, nh, T, hs] behind those of a past [B, nh, P, hs]."""
    for axis in (0, 1, 3):
        reading.same_size(past.ty.shape.values[axis], new.ty.shape.values[axis])
    if equal(past.ty.shape.values[2], 0):
        return new
    return reading.emit(op.concat([past, new], axis=2))


def _attention(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value | tuple[Value, ...]:
    """Convert Attention: the projection x · W + b to q, k and v, and attention with them."""
    given = inputs_of(node, "input", "weights", "bias", "mask_index", "past", "attention_bias", "past_sequence_length")
    refuse_inputs(given, "past_sequence_length")
    qkv = reading.emit(op.matmul(reading.tensor(given["input"]), reading.tensor(given["weights"])))
    if "bias" in given:
        qkv = reading.emit(op.add(qkv, reading.tensor(given["bias"])))
    return attention_of_projection(reading, node, attributes, given, qkv)


def attention_of_projection(
    reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any], given: dict[str, str], qkv: relax.Expr
) -> Value | tuple[Value, ...]:
    """Attend with q, k and v that lie beside each other in qkv [B, T, 2C + Cv], as Attention and QAttention do."""
    refuse_unless(attributes, do_rotary=0, past_present_share_buffer=0)
    nh = number(attributes, "num_heads")
    B, T, width = qkv.ty.shape.values
    C, _, Cv = attributes.get("qkv_hidden_sizes") or [int(width) // 3] * 3
    pieces = reading.emit(op.split(qkv, [C, 2 * C] if Cv != C else 3, axis=2))
    q, k, v = (heads_of(reading, reading.emit(relax.TupleGetItem(pieces, i)), nh, what) for i, what in enumerate("qkv"))
    how = Scores(scale_of(attributes, C // nh))
    has_past = "past" in given and not equal(reading.shape(given["past"])[3], 0)
    past = halves(reading, reading.tensor(given["past"])) if has_past else None
    S = simplified(past[0].ty.shape.values[2] + T) if past else T
    if "mask_index" in given:
        add_mask(reading, how, given["mask_index"], (B, T, S), attributes)
    if "attention_bias" in given:
        how.add_bias(reading, given["attention_bias"], [B, nh, T, S])
    causal = attributes.get("unidirectional", 0) == 1
    wants_present = len(node.output) > 1 and bool(node.output[1])
    if causal and past is None and how.are_plain and Cv == C:
        y = attend_causally(reading, q, k, v, how.scale)
        rows = [reading.emit(op.permute_dims(x, SWAP)) for x in (k, v)] if wants_present else []
    else:
        rows = [reading.emit(op.permute_dims(x, SWAP)) for x in (k, v)]
        if past is not None:
            rows = [joined(reading, before, new) for before, new in zip(past, rows, strict=True)]
        how.hidden = later_keys(aligned_right=True) if causal else None
        y = attend(reading, q, rows[0], rows[1], how)
    present = None
    if wants_present:
        if Cv != C:
            raise UserError("a present of keys and values of different widths is not supported")
        present = op.concat([reading.emit(op.expand_dims(x, [0])) for x in rows], axis=0)
    return outputs_of(node, output=merged(reading, y), present=present)


def _multi_head_attention(
    reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]
) -> Value | tuple[Value, ...]:
    """Convert MultiHeadAttention: q [B, T, C] with k and v of the same layout, packed, or in heads already."""
    given = inputs_of(
        node, "query", "key", "value", "bias", "key_padding_mask", "attention_bias", "past_key", "past_value",
        "past_sequence_length", "cache_indirection",
    )  # fmt: skip
    refuse_inputs(given, "past_sequence_length", "cache_indirection")
    if ("past_key" in given) != ("past_value" in given):
        raise UserError("past_key and past_value are only supported together")
    nh = number(attributes, "num_heads")
    q, k, v = _queries_keys_values(reading, given, nh)
    B, T, _, hs = q.ty.shape.values
    L = reading.same_size(k.ty.shape.values[2], v.ty.shape.values[2])
    for x in (k, v):
        reading.same_size(x.ty.shape.values[0], B)
    if "past_key" in given:
        k = joined(reading, reading.tensor(given["past_key"]), k)
        v = joined(reading, reading.tensor(given["past_value"]), v)
    S = simplified(k.ty.shape.values[2])
    how = Scores(scale_of(attributes, int(hs)))
    if "key_padding_mask" in given:
        add_mask(reading, how, given["key_padding_mask"], (B, T, S), attributes)
    if "attention_bias" in given:
        how.add_bias(reading, given["attention_bias"], [B, nh, T, S])
    if attributes.get("unidirectional", 0) == 1:
        if "past_key" in given and not equal(L, T):
            raise UserError(f"unidirectional with a past, {T} queries and {L} keys is not supported, only as many")
        how.hidden = later_keys(aligned_right="past_key" in given)
    same = equal(S, T) and equal(hs, v.ty.shape.values[3])
    if how.hidden is not None and how.are_plain and "past_key" not in given and same:
        rows = [reading.emit(op.permute_dims(x, SWAP)) for x in (k, v)]
        y = attend_causally(reading, q, rows[0], rows[1], how.scale)
    else:
        y = attend(reading, q, k, v, how)
    return outputs_of(node, output=merged(reading, y), present_key=k, present_value=v, qk=None)


def _queries_keys_values(reading: Reading, given: dict[str, str], nh: int) -> list[relax.Expr]:
    """Give q [B, T, nh, hs], k [B, nh, L, hs] and v [B, nh, L, hv] of MultiHeadAttention, their biases added."""
    query = reading.tensor(given["query"])
    rank = len(query.ty.shape.values)
    if rank == 5:  # [B, T, nh, 3, hs]
        refuse_inputs(given, "key", "value")
        parts = _unpacked(reading, query, 3)
    elif rank == 3 and "key" in given:
        parts = [heads_of(reading, query, nh, "query")]
        key = reading.tensor(given["key"])
        if len(key.ty.shape.values) == 5:  # [B, L, nh, 2, hs]
            refuse_inputs(given, "value")
            parts += _unpacked(reading, key, 2)
        elif "value" not in given:
            raise UserError("a key without a value is not supported, but for one of shape [B, L, nh, 2, hs]")
        elif len(key.ty.shape.values) == 4:  # [B, nh, L, hs], of which nothing is moved
            refuse_inputs(given, "bias", "past_key")
            return [*parts, key, reading.tensor(given["value"])]
        else:
            parts += [heads_of(reading, reading.tensor(given[name]), nh, name) for name in ("key", "value")]
    else:
        shape, which = sizes_of(query.ty.shape.values), "with" if "key" in given else "without"
        raise UserError(
            f"a query of shape {shape} {which} a key is not supported, only [B, T, C] with one, or [B, T, nh, 3, hs] "
            "without"
        )
    if "bias" in given:
        sizes = [int(part.ty.shape.values[2]) * int(part.ty.shape.values[3]) for part in parts]
        bias = reading.emit(op.split(reading.tensor(given["bias"]), [sizes[0], sizes[0] + sizes[1]], axis=0))
        biases = [reading.emit(relax.TupleGetItem(bias, i)) for i in range(3)]
        shapes = [part.ty.shape.values[2:] for part in parts]
        biases = [reading.emit(op.reshape(each, shape)) for each, shape in zip(biases, shapes, strict=True)]
        parts = [reading.emit(op.add(part, each)) for part, each in zip(parts, biases, strict=True)]
    q, k, v = parts
    return [q, *(reading.emit(op.permute_dims(x, SWAP)) for x in (k, v))]


def _unpacked(reading: Reading, x: relax.Expr, count: int) -> list[relax.Expr]:
    """Give the `count` tensors [B, T, nh, hs] in x [B, T, nh, count, hs]."""
    pieces = reading.emit(op.split(x, count, axis=3))
    return [reading.emit(op.squeeze(reading.emit(relax.TupleGetItem(pieces, i)), [3])) for i in range(count)]


def _group_query_attention(
    reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]
) -> Value | tuple[Value, ...]:
    """Convert GroupQueryAttention: causal attention in which groups of heads share keys, with a cache.

    Sequence b has seqlens_k[b] + 1 keys after this call. Its queries are the last T of them, but in the first call, in
    which total_sequence_length equals T, they begin at 0. The cache that is given back has the length of the larger
    of total_sequence_length, which must follow from shapes, and of the cache that is taken: it grows, or is as long.
    """
    given = inputs_of(
        node, "query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length", "cos_cache",
        "sin_cache", "position_ids", "attention_bias", "head_sink", "k_scale", "v_scale",
    )  # fmt: skip
    refuse_inputs(given, "head_sink", "k_scale", "v_scale")
    refuse_unless(attributes, smooth_softmax=0, qk_output=0)
    for name in ("k_quant_type", "v_quant_type"):
        refuse_unless(attributes, **{name: b"NONE"})
    nh, nkv = number(attributes, "num_heads"), number(attributes, "kv_num_heads")
    total = reading.integers(given["total_sequence_length"])[0]
    while isinstance(total, tvm.tirx.Cast):  # it is int32 in the file
        total = total.value
    seqlens = reading.tensor(given["seqlens_k"])
    q, k, v = _grouped(reading, given, nh, nkv)
    _, T, _, hs = q.ty.shape.values
    B = q.ty.shape.values[0]
    for x in (k, v):
        reading.same_size(x.ty.shape.values[0], B)
        reading.same_size(x.ty.shape.values[1], T)
    if len(seqlens.ty.shape.values) == 1:
        reading.same_size(seqlens.ty.shape.values[0], B)
    else:  # it may be [B, 1] as well
        seqlens = reading.emit(op.reshape(seqlens, [B]))
    first = equal(total, T)

    def before(b: Any, seqlens: te.Tensor, T: Any, total: Any) -> tvm.ir.Expr:
        """Count the keys that were there before this call."""
        if first:
            return tvm.tirx.const(0, "int64")
        known = te.max(expression(seqlens(b), "int64") + 1 - expression(T, "int64"), tvm.tirx.const(0, "int64"))
        is_first = tvm.tirx.EQ(expression(T, "int64"), expression(total, "int64"))
        return tvm.tirx.Select(is_first, tvm.tirx.const(0, "int64"), known)

    sizes = [] if is_number(total) else [total]
    if attributes.get("do_rotary", 0) == 1:
        if "cos_cache" not in given or "sin_cache" not in given:
            raise UserError("do_rotary=1 without cos_cache and sin_cache is not supported")
        cos, sin = (reading.tensor(given[name]) for name in ("cos_cache", "sin_cache"))
        if "position_ids" in given:
            positions = reading.tensor(given["position_ids"])
        else:

            def count(like: te.Tensor, seqlens: te.Tensor, *passed: Any) -> te.Tensor:
                T = like.shape[1]
                size = passed[0] if passed else total

                def at(b: Any, t: Any) -> tvm.ir.Expr:
                    return before(b, seqlens, T, size) + expression(t, "int64")

                return te.compute(like.shape[:2], at, name="positions")

            positions = reading.builder.emit_te(count, q, seqlens, *sizes, primfunc_name_hint="positions")
        interleaved = attributes.get("rotary_interleaved", 0) == 1
        q, k = (rotated(reading, x, positions, cos, sin, 2 * int(cos.ty.shape.values[1]), interleaved) for x in (q, k))
    how = Scores(scale_of(attributes, int(hs)), float(attributes.get("softcap", 0.0)))
    if "attention_bias" in given:
        how.add_bias(reading, given["attention_bias"], [B, nh, T, total])
    window = int(attributes.get("local_window_size", -1))
    rows = [reading.emit(op.permute_dims(x, SWAP)) for x in (k, v)]

    def repeated(x: relax.Expr, axis: int) -> relax.Expr:
        return x if nh == nkv else reading.emit(op.repeat(x, nh // nkv, axis=axis))

    if first and "past_key" not in given and how.are_plain and window < 0:
        y = attend_causally(reading, q, repeated(k, 2), repeated(v, 2), how.scale)
    else:
        past = ("past_key", "past_value") if "past_key" in given else (None, None)
        if past[0] or not first:
            rows = [
                _cached(reading, name and reading.tensor(given[name]), new, seqlens, before, total)
                for name, new in zip(past, rows, strict=True)
            ]

        def hidden(shape: list[Any], seqlens: te.Tensor, *passed: Any) -> Element:
            def at(b: Any, h: Any, t: Any, s: Any) -> tvm.ir.Expr:
                t, s = expression(t, "int64"), expression(s, "int64")
                here = before(b, seqlens, shape[2], passed[0] if passed else total) + t
                return te.any(s > here, s <= here - window) if window >= 0 else s > here

            return at

        how.hidden, how.of_hidden, how.sizes = hidden, [seqlens], sizes
        y = attend(reading, q, repeated(rows[0], 1), repeated(rows[1], 1), how)
    return outputs_of(node, output=merged(reading, y), present_key=rows[0], present_value=rows[1], qk=None)


def _grouped(reading: Reading, given: dict[str, str], nh: int, nkv: int) -> list[relax.Expr]:
    """Give q [B, T, nh, hs], and k and v [B, T, nkv, hs], of GroupQueryAttention."""
    query = reading.tensor(given["query"])
    if nh % nkv:
        raise UserError(f"num_heads={nh} is not a multiple of kv_num_heads={nkv}")
    if "key" in given and "value" in given:
        key, value = (reading.tensor(given[name]) for name in ("key", "value"))
        return [
            heads_of(reading, query, nh, "query"),
            heads_of(reading, key, nkv, "key"),
            heads_of(reading, value, nkv, "value"),
        ]
    if "key" in given or "value" in given:
        raise UserError("key and value are only supported together")
    packed = heads_of(reading, query, nh + 2 * nkv, "query")
    pieces = reading.emit(op.split(packed, [nh, nh + nkv], axis=2))
    return [reading.emit(relax.TupleGetItem(pieces, i)) for i in range(3)]


def _cached(
    reading: Reading, past: relax.Expr | None, new: relax.Expr, seqlens: relax.Expr, before: Element, total: Any
) -> relax.Expr:
    """Put new rows [B, nkv, T, hs] at their places in a cache, and zeros behind them."""
    _, nkv, _, hs = new.ty.shape.values
    length = total if past is None else simplified(tvm.tirx.Max(expression(total, "int64"), past.ty.shape.values[2]))
    sizes = [] if is_number(total) else [total]

    def cached(new: te.Tensor, seqlens: te.Tensor, *rest: Any) -> te.Tensor:
        old = rest[0] if past is not None else None
        passed = rest[0 if past is None else 1 :]
        T = expression(new.shape[2], "int64")

        def at(b: Any, h: Any, s: Any, d: Any) -> tvm.ir.Expr:
            s = expression(s, "int64")
            start = before(b, seqlens, T, passed[0] if passed else total)
            zero = tvm.tirx.const(0.0, "float32")
            row = new(b, h, te.max(te.min(s - start, T - 1), 0), d)
            behind = te.if_then_else(te.all(s >= start, s < start + T), row, zero)
            if old is None:
                return behind
            before_this = te.all(s < start, s < expression(old.shape[2], "int64"))
            return te.if_then_else(before_this, old(b, h, s, d), behind)

        return te.compute([new.shape[0], nkv, length, hs], at, name="cached")

    arguments = [new, seqlens, *([] if past is None else [past]), *sizes]
    return reading.builder.emit_te(cached, *arguments, primfunc_name_hint="cached")


def rotated(
    reading: Reading,
    x: relax.Expr,
    positions: relax.Expr,
    cos: relax.Expr,
    sin: relax.Expr,
    width: int,
    interleaved: bool,
) -> relax.Expr:
    """Rotate the first `width` elements of each head of x [B, T, nh, hs], in pairs, by the angles of positions.

    positions: [B, T], or [1] of the first. cos, sin: [positions, width / 2]. A pair is two neighbours if
    `interleaved`, else the elements i and i + width / 2.
    """
    half = width // 2
    counted = len(positions.ty.shape.values) == 1

    def rotate(x: te.Tensor, positions: te.Tensor, cos: te.Tensor, sin: te.Tensor) -> te.Tensor:
        def at(b: Any, t: Any, h: Any, d: Any) -> tvm.ir.Expr:
            place = expression(positions(0), "int64") + expression(t, "int64") if counted else positions(b, t)
            row = te.max(te.min(expression(place, "int64"), expression(cos.shape[0], "int64") - 1), 0)  # never outside
            pair = tvm.tirx.floordiv(d, 2) if interleaved else tvm.tirx.floormod(d, half)
            first = tvm.tirx.floormod(d, 2) < 1 if interleaved else d < half
            step = 1 if interleaved else half
            last = x.shape[3] - 1
            turned = te.if_then_else(
                first,
                x(b, t, h, d) * cos(row, pair) - x(b, t, h, te.min(d + step, last)) * sin(row, pair),
                x(b, t, h, d) * cos(row, pair) + x(b, t, h, te.max(d - step, 0)) * sin(row, pair),
            )
            return turned if width == int(x.shape[3]) else te.if_then_else(d < width, turned, x(b, t, h, d))

        return te.compute(x.shape, at, name="rotate")

    return reading.builder.emit_te(rotate, x, positions, cos, sin, primfunc_name_hint="rotate")


def _rotary_embedding(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    """Convert RotaryEmbedding of x [B, T, C] or [B, nh, T, hs]."""
    refuse_unless(attributes, is_packed_batching=0, scale=1.0)
    x, positions, cos, sin = (reading.tensor(name) for name in node.input)
    half = int(cos.ty.shape.values[1])
    width = attributes.get("rotary_embedding_dim", 0) or 2 * half
    if width != 2 * half:
        raise UserError(f"rotary_embedding_dim={width} with angles for {2 * half} elements is not supported")
    interleaved = attributes.get("interleaved", 0) == 1
    shape = list(x.ty.shape.values)
    if len(shape) == 4:
        y = rotated(reading, reading.emit(op.permute_dims(x, SWAP)), positions, cos, sin, width, interleaved)
        return op.permute_dims(y, SWAP)
    heads = attributes.get("num_heads", 0) or int(shape[2]) // width
    return merged(
        reading, rotated(reading, heads_of(reading, x, heads, "input"), positions, cos, sin, width, interleaved)
    )


def _skip_layer_norm(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value | tuple[Value, ...]:
    given = inputs_of(node, "input", "skip", "gamma", "beta", "bias")
    x = _with_skip(reading, given)
    gain = reading.tensor(given["gamma"])
    bias = reading.tensor(given["beta"]) if "beta" in given else zeros_like(reading, gain)
    y = op.nn.layer_norm(x, gain, bias, axes=[-1], epsilon=attributes.get("epsilon", 1e-12))
    return outputs_of(node, output=reading.emit(y), mean=None, inv_std_var=None, input_skip_bias_sum=x)


def _skip_rms_norm(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value | tuple[Value, ...]:
    given = inputs_of(node, "input", "skip", "gamma", "bias")
    x = _with_skip(reading, given)
    y = rms_norm(reading, x, reading.tensor(given["gamma"]), attributes.get("epsilon", 1e-12))
    return outputs_of(node, output=y, mean=None, inv_std_var=None, input_skip_bias_sum=x)


def _with_skip(reading: Reading, given: dict[str, str]) -> relax.Expr:
    """Sum up the input, the skip and the bias, if there is one, in ONNX Runtime's order."""
    x = reading.tensor(given["input"])
    for name in ("skip", "bias"):
        if name in given:
            x = reading.emit(op.add(x, reading.tensor(given[name])))
    return x


def zeros_like(reading: Reading, gain: relax.Expr) -> relax.Expr:
    """Give a weight of zeros, as Relax's LayerNorm always adds one."""
    C = int(gain.ty.shape.values[0])
    return reading.add_weight(f"zeros_{C}", np.zeros(C, str(gain.ty.dtype)))


def rms_norm(reading: Reading, x: relax.Expr, gain: relax.Expr, epsilon: float) -> relax.Expr:
    """Divide x [..., C] by the root of the mean of its squares, and multiply it by a gain [C]."""
    return reading.emit(op.nn.rms_norm(x, gain, axes=[-1], epsilon=epsilon))


def _rms_norm(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value | tuple[Value, ...]:
    """Convert SimplifiedLayerNormalization, which ONNX Runtime writes into ONNX's own domain."""
    x, gain = (reading.tensor(name) for name in node.input)
    if attributes.get("axis", -1) not in (-1, len(x.ty.shape.values) - 1):
        raise UserError(f"axis={attributes['axis']} is not supported, only the last one")
    y = rms_norm(reading, x, gain, attributes.get("epsilon", 1e-5))
    return outputs_of(node, output=y, inv_std_var=None)


def _embed_layer_norm(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value | tuple[Value, ...]:
    """Convert EmbedLayerNormalization: LayerNorm of rows of up to three tables, and the length of each sequence."""
    given = inputs_of(
        node, "input_ids", "segment_ids", "word_embedding", "position_embedding", "segment_embedding", "gamma", "beta",
        "mask", "position_ids",
    )  # fmt: skip
    refuse_unless(attributes, mask_index_type=1)
    ids = reading.tensor(given["input_ids"])
    B, T = ids.ty.shape.values

    def rows(table: str, of: relax.Expr) -> relax.Expr:
        return reading.emit(op.take(reading.tensor(given[table]), of, axis=0, mode="clip"))

    if "position_ids" in given:
        positions = reading.tensor(given["position_ids"])
    else:
        positions = reading.emit(op.arange(*map(relax.prim_value, (0, T, 1)), dtype="int64"))
    x = reading.emit(op.add(rows("word_embedding", ids), rows("position_embedding", positions)))
    if "segment_embedding" in given and "segment_ids" in given:
        x = reading.emit(op.add(x, rows("segment_embedding", reading.tensor(given["segment_ids"]))))
    gain, bias = (reading.tensor(given[name]) for name in ("gamma", "beta"))
    y = reading.emit(op.nn.layer_norm(x, gain, bias, axes=[-1], epsilon=attributes.get("epsilon", 1e-12)))
    if "mask" in given:
        ones = reading.emit(op.equal(reading.tensor(given["mask"]), relax.const(1, "int32")))
        lengths = reading.emit(op.sum(reading.emit(op.astype(ones, "int32")), axis=[1]))
    else:
        lengths = reading.emit(op.zeros([B], "int32"))
    return outputs_of(node, output=y, mask_index=lengths, embedding_sum=x)


def _fast_gelu(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    return op.nn.gelu_tanh(_with_bias(reading, node))


def _bias_gelu(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    return op.nn.gelu(_with_bias(reading, node))


def _with_bias(reading: Reading, node: onnx.NodeProto) -> relax.Expr:
    x = reading.tensor(node.input[0])
    has_bias = len(node.input) > 1 and node.input[1]
    return reading.emit(op.add(x, reading.tensor(node.input[1]))) if has_bias else x


def _quick_gelu(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    x = reading.tensor(node.input[0])
    scaled = reading.emit(op.multiply(x, relax.const(attributes.get("alpha", 1.702), "float32")))
    return op.multiply(x, reading.emit(op.sigmoid(scaled)))


def _fused_matmul(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    """Convert FusedMatMul: alpha · a · b, either of which may be transposed."""
    refuse_unless(attributes, transBatchA=0, transBatchB=0)
    a, b = (
        transposed(reading, reading.tensor(name)) if attributes.get(flag, 0) else reading.tensor(name)
        for name, flag in zip(node.input, ("transA", "transB"), strict=True)
    )
    y = op.matmul(a, b)
    alpha = attributes.get("alpha", 1.0)
    return y if alpha == 1 else op.multiply(reading.emit(y), relax.const(alpha, "float32"))


def transposed(reading: Reading, x: relax.Expr) -> relax.Expr:
    """Exchange the last two dimensions; a vector stays one."""
    rank = len(x.ty.shape.values)
    return x if rank < 2 else reading.emit(op.permute_dims(x, [*range(rank - 2), rank - 1, rank - 2]))


def _fused_gemm(reading: Reading, node: onnx.NodeProto, attributes: dict[str, Any]) -> Value:
    """Convert FusedGemm: a Gemm and the activation behind it."""
    kind = attributes.get("activation", b"").decode()
    if kind not in ACTIVATIONS:
        raise UserError(f"activation {kind!r} is not supported, only {', '.join(ACTIVATIONS)}")
    y = layers.CONVERTERS["Gemm"](reading, node, attributes)
    assert not isinstance(y, Indexed | tuple)
    return ACTIVATIONS[kind](reading.emit(y))


ACTIVATIONS = {"Relu": op.nn.relu, "Sigmoid": op.sigmoid, "Tanh": op.tanh}
CONVERTERS: dict[str, Converter] = {
    "SimplifiedLayerNormalization": _rms_norm,
    "com.microsoft.Attention": _attention,
    "com.microsoft.BiasGelu": _bias_gelu,
    "com.microsoft.EmbedLayerNormalization": _embed_layer_norm,
    "com.microsoft.FastGelu": _fast_gelu,
    "com.microsoft.FusedGemm": _fused_gemm,
    "com.microsoft.FusedMatMul": _fused_matmul,
    "com.microsoft.Gelu": _bias_gelu,
    "com.microsoft.GroupQueryAttention": _group_query_attention,
    "com.microsoft.MultiHeadAttention": _multi_head_attention,
    "com.microsoft.QuickGelu": _quick_gelu,
    "com.microsoft.RotaryEmbedding": _rotary_embedding,
    "com.microsoft.SkipLayerNormalization": _skip_layer_norm,
    "com.microsoft.SkipSimplifiedLayerNormalization": _skip_rms_norm,
    "com.microsoft.TransposeMatMul": _fused_matmul,
}
