"""Makes a KV cache that grows by a copy in every step one that is allocated once and written in place.

Files of transformers and Optimum take the keys and values of P earlier tokens and give them back with those of T more,
joined: a copy of all of them for every token. Where nothing but causal attention reads them, the same numbers come of
a cache that has room for the longest sequence, into which the new rows are written.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax
from tvm.relax import op

from tvm_frontend.frontends.onnx.operators.attention import Seen, attend, scatter_rows
from tvm_frontend.frontends.onnx.operators.context import Reading
from tvm_frontend.graph import ENTRY, Graph
from tvm_frontend.passes.recover_attention import SWAP, recover_attention
from tvm_frontend.passes.rewrite import calls, same_shape

LONGEST_PATH = 8  # the most operators between a range of positions and the table that they look up
MOVES = ("expand_dims", "broadcast_to", "reshape", "squeeze", "astype")  # give positions another shape or type


@dataclass(frozen=True)
class Step:
    """Says how a binding is made again: as it was, or by one of the rules; `needs` are the variables that it reads."""

    kind: str
    needs: tuple[relax.Var, ...]


class NotPossible(Exception):
    """Tells why a graph's cache cannot be preallocated."""


def preallocate(graph: Graph, ids: int, logits: int, presents: Mapping[int, int], length: int) -> Graph:
    """Rewrite forward(ids, pasts…) → (logits, presents…) to forward(ids, pos, caches…) → (logits, pos + T, caches…).

    A past is [B, nh, P, hs], its present [B, nh, P + T, hs], and a cache [B, nh, length, hs], of which sequence b fills
    pos[b] rows. ids, logits: the index of that input and output. presents: for the index of each past that of its
    present. Raises NotPossible if there are other inputs, if something else than causal attention reads the keys and
    values, or if P is needed for anything but the positions that are looked up.
    """
    return _Preallocating(recover_attention(graph), ids, presents, length).graph(logits)


class _Preallocating:
    def __init__(self, graph: Graph, ids: int, presents: Mapping[int, int], length: int) -> None:
        self._graph, self._function = graph, graph.module[ENTRY]
        self._presents = dict(presents)
        number = int(self._function.attrs["num_input"])
        self._inputs, self._weights = self._function.params[:number], self._function.params[number:]
        if number != 1 + len(presents):
            raise NotPossible("it has other inputs than ids, masks, positions and a past")
        self._ids = self._inputs[ids]
        if len(self._ids.ty.shape.values) != 2:
            raise NotPossible("its ids are no [B, T]")
        self._B, self._T = self._ids.ty.shape.values
        self._pasts = [self._inputs[index] for index in presents]
        self._P = self._length_of_past()
        self._nh, self._hs = (int(self._pasts[0].ty.shape.values[axis]) for axis in (1, 3))
        self._length = length
        self._bindings = [binding for block in self._function.body.blocks for binding in block.bindings]
        self._value = {binding.var: binding.value for binding in self._bindings}
        self._steps = {binding.var: self._step(binding.value) for binding in self._bindings}

    def _length_of_past(self) -> tvm.tirx.Var:
        lengths = set()
        for past in self._pasts:
            shape = past.ty.shape.values
            if len(shape) != 4 or any(not isinstance(shape[axis], tvm.tirx.IntImm) for axis in (1, 3)):
                raise NotPossible(f"its past {past.name} is no [B, nh, P, hs]")
            if not same_shape([shape[0], *shape[1:4:2]], [self._B, *self._pasts[0].ty.shape.values[1:4:2]]):
                raise NotPossible(f"its past {past.name} has other sizes than the others")
            if not isinstance(shape[2], tvm.tirx.Var):
                raise NotPossible(f"its past {past.name} has a fixed length")
            lengths.add(shape[2])
        if len(lengths) != 1:
            raise NotPossible("its pasts have different lengths")
        return lengths.pop()

    def graph(self, logits: int) -> Graph:
        """Build the new function."""
        result = self._function.body.body
        outputs = list(result.fields) if isinstance(result, relax.Tuple) else [result]
        presents = [self._without_cast(outputs[index]) for index in self._presents.values()]
        for present, past in zip(presents, self._pasts, strict=True):
            written = self._written(present)
            if written is None or not written[0].same_as(past):
                raise NotPossible(f"what it gives for the past {past.name} is not that with new rows behind it")
        needed = self._needed([outputs[logits], *presents])
        module = self._graph.module.clone()
        del module[module.get_global_var(ENTRY)]
        reading = Reading(relax.BlockBuilder(module))
        ids = relax.Var("ids", relax.TensorType([self._B, self._T], "int64"))
        pos = relax.Var("pos", relax.TensorType([self._B], "int64"))
        shape = [self._B, self._nh, self._length, self._hs]
        caches = {past: relax.Var(past.name, relax.TensorType(shape, "float32")) for past in self._pasts}
        new: dict[relax.Var, relax.Expr] = {weight: weight for weight in self._weights}
        builder = reading.builder
        with reading.function(2 + len(caches)):
            with builder.dataflow():
                dtype = str(self._ids.ty.dtype)
                new[self._ids] = ids if dtype == "int64" else builder.emit(op.astype(ids, dtype))
                end = builder.emit(op.add(pos, self._counted(reading, self._T, 1)))
                for binding in self._bindings:
                    if binding.var in needed:
                        made = self._made(reading, binding.var, new, caches, pos, end)
                        new[binding.var] = made if isinstance(made, relax.Var) else builder.emit(made)
                        self._check(binding.var, new[binding.var])
                results = [new[outputs[logits]], end, *(new[present] for present in presents)]
                results = [builder.emit_output(each) for each in results]
            builder.emit_func_output(relax.Tuple(results), [ids, pos, *caches.values(), *self._weights])
        module = builder.finalize()
        if free := relax.analysis.free_symbolic_vars(module[ENTRY]):
            raise NotPossible(f"it needs the size {free[0].name} for more than positions and attention")
        return Graph(module, self._graph.weights)

    def _step(self, value: relax.Expr) -> Step:
        """Choose how a binding is made again."""
        if (written := self._written_by(value)) is not None:
            return Step("write", (written[1],))
        if calls(value, "nn.attention") and str(value.attrs.causal_mask) == "BottomRight":
            rows = [self._rows(each) for each in value.args[1:3]]
            if None not in rows and value.attrs.window_size is None and len(value.args) == 3:
                return Step("attend", (value.args[0], *rows))
        if calls(value, "take") and self._first_position(value.args[1]) is not None:
            return Step("look up", (value.args[0],))
        return Step("copy", tuple(relax.analysis.free_vars(value)))

    def _needed(self, wanted: Iterable[relax.Var]) -> set[relax.Var]:
        """List the variables that the results depend on. Raises NotPossible if one reads a past by no rule."""
        needed = set(wanted)
        for binding in reversed(self._bindings):
            if binding.var not in needed:
                continue
            step = self._steps[binding.var]
            for var in step.needs:
                past = var in self._pasts or (var in self._steps and self._steps[var].kind == "write")
                if past and step.kind in ("copy", "look up"):
                    name = getattr(getattr(binding.value, "op", None), "name", "another operator")
                    raise NotPossible(f"its keys and values are read by {name}, and not by causal attention alone")
            needed.update(step.needs)
        return needed

    def _made(
        self,
        reading: Reading,
        var: relax.Var,
        new: Mapping[relax.Var, relax.Expr],
        caches: Mapping[relax.Var, relax.Var],
        pos: relax.Var,
        end: relax.Var,
    ) -> relax.Expr:
        value, step = self._value[var], self._steps[var]
        emit = reading.builder.emit
        if step.kind == "write":
            past, rows = self._written_by(value) or (None, None)
            return scatter_rows(reading, caches[past], new[rows], pos)
        if step.kind == "attend":
            q, k, v = (new[each] for each in step.needs)
            seen = Seen(filled=end, first=None, causal=True)
            scale = value.attrs.scale
            scale = None if scale is None else float(scale)
            y = attend(reading, emit(op.permute_dims(q, SWAP)), k, v, seen, scale=scale).y
            return op.permute_dims(reading.emit(y), SWAP)
        if step.kind == "look up":
            first = self._first_position(value.args[1])
            counted = emit(op.arange(*map(relax.prim_value, (first, first + self._T, 1)), dtype="int64"))
            places = emit(op.add(emit(op.expand_dims(pos, [1])), counted))  # [B, T]
            return op.take(new[value.args[0]], places, axis=value.attrs.axis, mode=value.attrs.mode)
        return _substituted(value, new)

    def _check(self, var: relax.Var, made: relax.Expr) -> None:
        """Raise NotPossible if a binding that is no cache or looked-up row has another shape than it had."""
        if self._steps[var].kind != "copy" or not isinstance(var.ty, relax.TensorType):
            return
        if made.ty.shape is None or not same_shape(made.ty.shape.values, var.ty.shape.values):
            raise NotPossible(f"its positions are used in {var.name} in a way that has the same for all sequences")

    def _counted(self, reading: Reading, first: Any, count: int) -> relax.Expr:
        counted = reading.builder.emit(op.arange(*map(relax.prim_value, (first, first + count, 1)), dtype="int64"))
        return reading.builder.emit(op.squeeze(counted, [0]))

    def _without_cast(self, expr: relax.Expr) -> relax.Expr:
        """Follow a variable to what it was before it was given another name or type."""
        while (value := self._value.get(expr)) is not None:
            if isinstance(value, relax.Var):
                expr = value
            elif calls(value, "astype"):
                expr = value.args[0]
            else:
                break
        return expr

    def _written(self, var: relax.Expr) -> tuple[relax.Var, relax.Var] | None:
        value = self._value.get(var)
        return None if value is None else self._written_by(value)

    def _written_by(self, value: relax.Expr) -> tuple[relax.Var, relax.Var] | None:
        """Give the past and the new rows if a value is both joined along the axis of tokens."""
        if not calls(value, "concat") or int(value.attrs.axis) not in (2, -2):
            return None
        parts = value.args[0].fields if isinstance(value.args[0], relax.Tuple) else []
        if len(parts) != 2 or self._without_cast(parts[0]) not in self._pasts:
            return None
        return self._without_cast(parts[0]), parts[1]

    def _rows(self, expr: relax.Expr) -> relax.Var | None:
        """Give the joined keys or values [B, nh, P+T, hs] that are turned to [B, P+T, nh, hs]; None for others."""
        axes = list(range(len(SWAP)))
        value = self._value.get(expr, expr)
        while calls(value, "permute_dims") and len(value.attrs.axes or ()) == len(SWAP):
            axes = [int(value.attrs.axes[axis]) for axis in axes]
            expr = self._without_cast(value.args[0])
            value = self._value.get(expr, expr)
        return expr if axes == SWAP and self._written(expr) is not None else None

    def _first_position(self, indices: relax.Expr) -> int | None:
        """Give c if indices count c + P, c + P + 1, … along T tokens, in whatever shape; None for others."""
        value = self._value.get(indices, indices)
        for _ in range(LONGEST_PATH):
            if isinstance(value, relax.Var) or any(calls(value, name) for name in MOVES):
                value = value if isinstance(value, relax.Var) else value.args[0]
                value = self._value.get(value, value)
        if not calls(value, "arange") or len(indices.ty.shape.values) > 2:
            return None
        start, stop, step = (getattr(each, "value", each) for each in value.args)
        first = tvm.sym.Analyzer().simplify(start - self._P)
        if not isinstance(first, tvm.tirx.IntImm) or not same_shape([stop, step], [start + self._T, 1]):
            return None
        return int(first)


def _substituted(value: relax.Expr, new: Mapping[relax.Var, relax.Expr]) -> relax.Expr:
    """Give a value with its variables replaced."""
    if isinstance(value, relax.Var):
        return new.get(value, value) if isinstance(value.ty, tvm.ir.PrimType) else new[value]  # sizes stay
    if isinstance(value, relax.Tuple):
        return relax.Tuple([_substituted(field, new) for field in value.fields])
    if isinstance(value, relax.TupleGetItem):
        return relax.TupleGetItem(_substituted(value.tuple_value, new), value.index)
    if isinstance(value, relax.Call):
        args = [_substituted(arg, new) for arg in value.args]
        return relax.Call(value.op, args, value.attrs, value.ty_args)
    return value
