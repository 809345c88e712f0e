"""Removes a cast to more bits and back, as it stands between two kernels that work in fewer bits."""

from tvm import relax
from tvm.relax.dpl import is_op, wildcard

from tvm_frontend.graph import Graph
from tvm_frontend.passes.rewrite import Matched, Rewriting

WIDENED = {"bfloat16": "float32", "float16": "float32"}  # each with a type that holds all its numbers


def cancel_casts(graph: Graph) -> Graph:
    """Rewrite astype(astype(x, wider), dtype of x) → x."""
    rewriting = Rewriting(graph)
    x = wildcard()
    widened = is_op("relax.astype")(x)

    def cancel(call: relax.Expr, matched: Matched) -> relax.Expr | None:
        dtype = str(matched[x].ty.dtype)
        exact = WIDENED.get(dtype) == str(matched[widened].ty.dtype)
        return matched[x] if exact and str(call.ty.dtype) == dtype else None

    rewriting.apply(is_op("relax.astype")(widened), cancel)
    return rewriting.finish()
