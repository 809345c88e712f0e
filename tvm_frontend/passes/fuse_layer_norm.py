"""Fuses LayerNorm to one vectorised kernel."""

from tvm import relax
from tvm.relax.dpl import is_op, wildcard

from tvm_frontend.graph import Graph
from tvm_frontend.kernels import Kernels
from tvm_frontend.passes.rewrite import Matched, Rewriting


def fuse_layer_norm(graph: Graph, kernels: Kernels) -> Graph:
    """Rewrite layer_norm(x [.., C], gain, bias) over the last axis → one kernel."""
    rewriting = Rewriting(graph)
    x, gain, bias = wildcard(), wildcard(), wildcard()

    def fuse(call: relax.Expr, matched: Matched) -> relax.Expr | None:
        rank = len(call.ty.shape.values)
        if rank < 2 or [int(axis) for axis in call.attrs.axes] not in ([-1], [rank - 1]):
            return None
        if str(call.ty.dtype) != "float32":
            return None
        C, epsilon = int(call.ty.shape.values[-1]), float(call.attrs.epsilon)
        kernel = kernels.layer_norm(C, epsilon, narrow=rewriting.is_narrowed(call))
        return kernel and rewriting.call("layer_norm", kernel, [matched[x], matched[gain], matched[bias]], call)

    rewriting.apply(is_op("relax.nn.layer_norm")(x, gain, bias), fuse)
    return rewriting.finish()
