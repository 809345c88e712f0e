"""Makes the last linear layer an entry point of its own: only the rows that somebody reads go through it.

A prompt that fills a cache needs one row of T, and GPT-2's vocabulary makes the layer a third of all work.
"""

from collections.abc import Sequence

from tvm import relax
from tvm.relax.utils import copy_with_new_vars

from tvm_frontend.graph import BODY, ENTRY, HEAD, Graph
from tvm_frontend.passes.rewrite import calls, same_shape


def split_head(graph: Graph) -> Graph:
    """Add body, forward up to the hidden state [B, T, C], and head, from there to the logits, beside forward.

    head takes the row of each sequence that it computes, int64 [B], and returns [B, 1, V]. Both call the same kernels
    as forward and take all weights. The graph stays as it is unless one kernel computes its logits from a hidden state
    of every position and weights.
    """
    function = graph.module[ENTRY]
    inputs = int(function.attrs["num_input"])
    weights = function.params[inputs:]
    result = function.body.body
    logits, *rest = result.fields if isinstance(result, relax.Tuple) else [result]
    bindings = [binding for block in function.body.blocks for binding in block.bindings]
    last = next((binding for binding in bindings if binding.var.same_as(logits)), None)
    if last is None or not calls(last.value, "call_tir"):
        return graph
    hidden, *others = last.value.args[1].fields
    if not (_of_every_position(hidden, function.params[0]) and all(_is_one_of(other, weights) for other in others)):
        return graph
    before = [binding for binding in bindings if binding is not last]
    if any(_is_one_of(logits, relax.analysis.free_vars(binding.value)) for binding in before):
        return graph
    out = relax.Var("hidden", hidden.ty)
    body = _function(function.params, [*before, relax.VarBinding(out, hidden)], [out, *rest])
    head = _head(last, hidden, others, weights)
    module = graph.module.clone()
    for name, split, number in ((BODY, body, inputs), (HEAD, head, 2)):
        module[name] = split.with_attrs({"num_input": number, "global_symbol": name})
    return Graph(module, graph.weights)


def _head(
    last: relax.Binding, hidden: relax.Var, others: Sequence[relax.Var], weights: Sequence[relax.Var]
) -> relax.Function:
    """Make head(hidden, rows, *weights) from the binding that computes the logits of `hidden` and other arguments."""
    B = hidden.ty.shape.values[0]
    kernel, _ = last.value.args
    given = relax.Var("hidden", hidden.ty)
    rows = relax.Var("rows", relax.TensorType([B], "int64"))
    logits = relax.TensorType([B, 1, last.var.ty.shape.values[-1]], str(last.var.ty.dtype))
    builder = relax.BlockBuilder()
    with builder.function(HEAD, [given, rows, *weights]):
        with builder.dataflow():
            indices = builder.emit(relax.op.reshape(rows, (B, 1, 1)))
            picked = builder.emit(relax.op.gather_nd(given, indices, batch_dims=1))  # [B, 1, C]
            out = builder.emit_output(relax.call_tir(kernel, [picked, *others], out_ty=logits))
        builder.emit_func_output(out)
    return copy_with_new_vars(builder.get()[HEAD])


def _function(params: Sequence[relax.Var], bindings: list[relax.Binding], results: list[relax.Expr]) -> relax.Function:
    result = relax.Tuple(results) if len(results) > 1 else results[0]
    types = [each.ty for each in results]
    type_ = relax.TupleType(types) if len(results) > 1 else types[0]
    body = relax.SeqExpr([relax.DataflowBlock(bindings)], result)
    # Two functions of a module may not share variables.
    return copy_with_new_vars(relax.Function(params, body, type_))


def _is_one_of(expr: relax.Expr, variables: Sequence[relax.Var]) -> bool:
    return any(expr.same_as(variable) for variable in variables)


def _of_every_position(hidden: relax.Expr, ids: relax.Var) -> bool:
    """Tell if `hidden` is [B, T, C] for ids [B, T]."""
    shape = hidden.ty.shape.values
    return len(shape) == 3 and same_shape(shape[:2], ids.ty.shape.values)
