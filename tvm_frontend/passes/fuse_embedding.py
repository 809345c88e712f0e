"""Fuses token plus position embedding to one kernel."""

from tvm import relax
from tvm.relax.dpl import is_op, wildcard

from tvm_frontend.graph import Graph
from tvm_frontend.kernels import Kernels
from tvm_frontend.passes.rewrite import Matched, Rewriting, add_of, calls, same_shape


def fuse_embedding(graph: Graph, kernels: Kernels) -> Graph:
    """Rewrite take(tokens, ids [B, T]) + take(positions, arange(0, T) [+ pos [B, 1]]) → one kernel."""
    rewriting = Rewriting(graph)
    tokens, ids, positions = wildcard(), wildcard(), wildcard()
    start, stop, step = wildcard(), wildcard(), wildcard()
    counted = is_op("relax.arange")(start, stop, step)
    pos = wildcard()
    after = is_op("relax.expand_dims")(pos)
    repeated = is_op("relax.broadcast_to")(counted, wildcard())
    indices = counted | repeated | add_of(after, counted)
    of_tokens = is_op("relax.take")(tokens, ids)
    of_positions = is_op("relax.take")(positions, indices)

    def fuse(call: relax.Expr, matched: Matched) -> relax.Expr | None:
        weights = [rewriting.weight(matched[table]) for table in (tokens, positions)]
        tables = [weight for weight in weights if weight is not None and weight.ndim == 2]
        if len(tables) != len(weights):
            return None
        if any(matched[rows].attrs.axis != 0 for rows in (of_tokens, of_positions)):
            return None
        if _integer(matched[start]) != 0 or _integer(matched[step]) != 1:
            return None
        (V, C), (block_size, _) = (table.shape for table in tables)
        *batch, length = matched[ids].ty.shape.values
        behind = pos in matched
        if not all(_is_given(rewriting, matched[each]) for each in (ids, pos) if each in matched):
            return None
        *before, rows, _ = matched[of_positions].ty.shape.values
        if len(batch) != 1 or not same_shape([rows], [length]) or (before and not _repeats(before, batch, behind)):
            return None
        if behind and (not same_shape(matched[pos].ty.shape.values, batch) or not _adds_last(matched[after])):
            return None
        kernel = kernels.embedding(V, block_size, C, behind=behind)
        arguments = [matched[tokens], matched[ids], matched[positions], *([matched[pos]] if behind else [])]
        return kernel and rewriting.call("embedding", kernel, arguments, call)

    rewriting.apply(add_of(of_tokens, of_positions), fuse)
    return rewriting.finish()


def _is_given(rewriting: Rewriting, expr: relax.Expr) -> bool:
    """Tell if a value is an input: the kernel reads rows unchecked, and a session checks its inputs alone."""
    value = rewriting.value(expr)
    return rewriting.is_input(value.args[0] if calls(value, "astype") else value)


def _repeats(before: list, batch: list, behind: bool) -> bool:
    """Tell if positions [*before, T] are of the batch, or the same ones for all of it."""
    return same_shape(before, batch) or (not behind and same_shape(before, [1]))


def _adds_last(expand_dims: relax.Call) -> bool:
    return [int(axis) for axis in expand_dims.attrs.axis] in ([1], [-1])


def _integer(expr: relax.Expr) -> int | None:
    value = getattr(expr, "value", None)
    value = getattr(value, "value", value)
    return int(value) if value is not None else None
