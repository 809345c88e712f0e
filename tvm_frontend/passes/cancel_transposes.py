"""Removes two transposes that undo each other."""

from tvm import relax
from tvm.relax.dpl import is_op, wildcard

from tvm_frontend.graph import Graph
from tvm_frontend.passes.rewrite import Matched, Rewriting


def cancel_transposes(graph: Graph) -> Graph:
    """Rewrite permute_dims(permute_dims(x)) → x where the second restores the order of the first."""
    rewriting = Rewriting(graph)
    x = wildcard()
    inner = is_op("relax.permute_dims")(x)
    outer = is_op("relax.permute_dims")(inner)

    def drop(call: relax.Expr, matched: Matched) -> relax.Expr | None:
        first, second = (_axes(matched[pattern]) for pattern in (inner, outer))
        undone = [first[axis] for axis in second] == list(range(len(first)))
        return matched[x] if undone else None

    rewriting.apply(outer, drop)
    return rewriting.finish()


def _axes(call: relax.Expr) -> list[int]:
    axes = call.attrs.axes
    return [int(axis) for axis in axes] if axes is not None else list(range(len(call.ty.shape.values)))[::-1]
