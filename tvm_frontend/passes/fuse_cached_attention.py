"""Fuses attention over a preallocated cache to one kernel that also writes the new rows, in place.

The kernel says how a row of the cache is kept: in fewer bits, the function's inputs get another type.
"""

from tvm import relax
from tvm.relax.dpl import is_call_tir, is_const, is_op, is_tuple_get_item, wildcard

from tvm_frontend.frontends.onnx.operators.attention import SCORES_UP_TO, WEIGHTS_UP_TO
from tvm_frontend.graph import Graph
from tvm_frontend.kernels import Kernels
from tvm_frontend.passes.rewrite import Matched, Rewriting, add_of, same_shape

TO_HEADS = [0, 2, 1, 3]  # [B, T, nh, hs] to [B, nh, T, hs], and back


def fuse_cached_attention(graph: Graph, kernels: Kernels) -> Graph:
    """Rewrite attention to two caches, with qkv scattered into them → kernel(qkv, pos, keys, values) [B, T, C].

    The function returns the caches that it was given: they hold the new rows, and are of the kernel's type.
    """
    rewriting = Rewriting(graph)
    qkv, pos, keys, values, start, stop, step = (wildcard() for _ in range(7))
    scale = is_const()
    thirds = is_op("relax.split")(qkv)
    parts = [is_op("relax.reshape")(is_tuple_get_item(thirds, i), wildcard()) for i in range(3)]
    q, k, v = heads = [is_op("relax.permute_dims")(part) for part in parts]
    rows_of_keys = is_call_tir("tensor_scatter", [keys, k, pos])
    rows_of_values = is_call_tir("tensor_scatter", [values, v, pos])
    counted = is_op("relax.arange")(start, stop, step)
    width = is_op("relax.squeeze")(counted) | counted
    scaled = is_op("relax.multiply")(q, scale)
    scores = is_op("relax.matmul")(scaled, is_op("relax.permute_dims")(rows_of_keys))
    end = add_of(pos, width)
    softmax = is_op("relax.nn.softmax")(is_call_tir(SCORES_UP_TO, [scores, end]))
    attended = is_op("relax.matmul")(is_call_tir(WEIGHTS_UP_TO, [softmax, end]), rows_of_values)
    from_heads = is_op("relax.permute_dims")(attended)
    merged = is_op("relax.reshape")(from_heads, wildcard())
    absorbed = {}  # from each cache as it was given to the input of the kernel's type

    def fuse(call: relax.Expr, matched: Matched) -> relax.Expr | None:
        if any(list(matched[part].attrs.axes) != TO_HEADS for part in (*heads, from_heads)):
            return None
        B, T, nh, hs = matched[parts[0]].ty.shape.values
        if int(matched[thirds].attrs.axis) != 2 or not same_shape(matched[qkv].ty.shape.values, [B, T, 3 * nh * hs]):
            return None
        if not same_shape([matched[start], matched[stop]], [T, T + 1]):
            return None
        caches = [matched[keys], matched[values]]
        if not all(rewriting.is_input_used_once(cache) for cache in caches):
            return None
        length = int(matched[keys].ty.shape.values[2])
        kernel = kernels.cached_attention(int(nh), int(hs), length, float(matched[scale].value.numpy()))
        if kernel is None:
            return None
        kept = kernel.params[2].ty  # the values have the same type
        type_ = relax.TensorType([*matched[keys].ty.shape.values[:3], kept.shape[3]], kept.dtype)
        absorbed.update({given: rewriting.change_input(given, type_) for given in caches})
        arguments = [matched[qkv], matched[pos]]
        return rewriting.call_in_place("cached_attention", kernel, arguments, [absorbed[each] for each in caches], call)

    rewriting.apply(merged, fuse)
    cache = wildcard()

    def forward(call: relax.Expr, matched: Matched) -> relax.Expr | None:
        return absorbed.get(matched[cache])

    rewriting.apply(is_call_tir("tensor_scatter", [cache, wildcard(), wildcard()]), forward)
    return rewriting.finish()
