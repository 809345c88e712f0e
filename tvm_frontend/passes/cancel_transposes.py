"""Makes one transpose of two, or none where they undo each other."""

from tvm import relax
from tvm.relax import op
from tvm.relax.dpl import is_op, wildcard

from tvm_frontend.graph import Graph
from tvm_frontend.passes.rewrite import Matched, Rewriting


def cancel_transposes(graph: Graph) -> Graph:
    """Rewrite permute_dims(permute_dims(x)) → permute_dims(x), or x where the second undoes the first."""
    rewriting = Rewriting(graph)
    x = wildcard()
    inner = is_op("relax.permute_dims")(x)
    outer = is_op("relax.permute_dims")(inner)

    def drop(call: relax.Expr, matched: Matched) -> relax.Expr | None:
        first, second = (_axes(matched[pattern]) for pattern in (inner, outer))
        both = [first[axis] for axis in second]
        return matched[x] if both == list(range(len(both))) else op.permute_dims(matched[x], both)

    rewriting.apply(outer, drop)
    return rewriting.finish()


def _axes(call: relax.Expr) -> list[int]:
    axes = call.attrs.axes
    return [int(axis) for axis in axes] if axes is not None else list(range(len(call.ty.shape.values)))[::-1]
