"""Fuses attention, with the split and the head layout around it, to one kernel over the fused QKV projection."""

from tvm import relax
from tvm.relax.dpl import is_op, is_tuple_get_item, wildcard

from tvm_frontend.graph import Graph
from tvm_frontend.kernels import Kernels
from tvm_frontend.passes.rewrite import Matched, Rewriting, same_shape


def fuse_attention(graph: Graph, kernels: Kernels) -> Graph:
    """Rewrite reshape(attention(q, k, v)), q, k, v being the thirds of qkv [B, T, 3C] → kernel(qkv) [B, T, C]."""
    rewriting = Rewriting(graph)
    qkv = wildcard()
    thirds = is_op("relax.split")(qkv)
    heads = [is_op("relax.reshape")(is_tuple_get_item(thirds, i), wildcard()) for i in range(3)]
    attention = is_op("relax.nn.attention")(*heads)
    merged = is_op("relax.reshape")(attention, wildcard())

    def fuse(call: relax.Expr, matched: Matched) -> relax.Expr | None:
        core = matched[attention]
        nh, hs = (int(size) for size in core.args[0].ty.shape.values[2:])
        if str(core.attrs.causal_mask) != "TopLeft" or core.attrs.window_size is not None:
            return None
        B, T, *_ = core.args[0].ty.shape.values
        if int(matched[thirds].attrs.axis) != 2 or not same_shape(matched[qkv].ty.shape.values, [B, T, 3 * nh * hs]):
            return None
        if not same_shape(call.ty.shape.values, [B, T, nh * hs]):
            return None
        scale = hs**-0.5 if core.attrs.scale is None else float(core.attrs.scale)
        kernel = kernels.causal_attention(nh, hs, scale)
        return kernel and rewriting.call("causal_attention", kernel, [matched[qkv]], call)

    rewriting.apply(merged, fuse)
    return rewriting.finish()
