"""Token plus position embedding becomes one kernel."""

from tvm import relax
from tvm.relax.dpl import is_op, wildcard

from tvm_frontend.graph import Graph
from tvm_frontend.passes.rewrite import Matched, Rewriting, add_of
from tvm_frontend.schedules import Kernels


def fuse_embedding(graph: Graph, kernels: Kernels) -> Graph:
    """take(tokens, ids [B, T]) + take(positions, arange(0, T)) → one kernel."""
    rewriting = Rewriting(graph)
    tokens, ids, positions = wildcard(), wildcard(), wildcard()
    start, stop, step = wildcard(), wildcard(), wildcard()
    places = is_op("relax.arange")(start, stop, step)
    take = is_op("relax.take")

    def fuse(call: relax.Expr, matched: Matched) -> relax.Expr | None:
        if any(rewriting.weight(matched[table]) is None for table in (tokens, positions)):
            return None
        if len(call.ty.shape.values) != 3 or _integer(matched[start]) != 0 or _integer(matched[step]) != 1:
            return None
        V, C = rewriting.weight(matched[tokens]).shape
        kernel = kernels.embedding(V, rewriting.weight(matched[positions]).shape[0], C)
        return kernel and rewriting.call("embedding", kernel, [matched[tokens], matched[ids], matched[positions]], call)

    rewriting.apply(add_of(take(tokens, ids), take(positions, places)), fuse)
    return rewriting.finish()


def _integer(expr: relax.Expr) -> int | None:
    value = getattr(expr, "value", None)
    value = getattr(value, "value", value)
    return int(value) if value is not None else None
