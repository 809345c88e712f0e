"""Fuses a matmul by a constant weight, and the operators after it, to a GEMM over packed weights with an epilogue."""

import numpy as np
from tvm import relax
from tvm.relax.dpl import DFPattern, is_op, wildcard

from tvm_frontend.graph import Graph
from tvm_frontend.kernels import Kernels
from tvm_frontend.passes.rewrite import Matched, Rewriting, add_of, is_transpose, same_shape

ACTIVATIONS = {"relax.nn.gelu_tanh": "gelu_tanh", "relax.nn.gelu": "gelu", "relax.nn.relu": "relu"}


def fuse_linear(graph: Graph, kernels: Kernels) -> Graph:
    """Rewrite x · W [+ bias] [→ activation | + residual] → one kernel, the longest form first."""
    rewriting = Rewriting(graph)
    x, weight, transposed, bias, residual = (wildcard() for _ in range(5))
    turned = is_op("relax.permute_dims")(transposed)
    product = is_op("relax.matmul")(x, turned) | is_op("relax.matmul")(x, weight)
    biased = add_of(product, bias)

    def rewrite(pattern: DFPattern, *, activation: str | None = None) -> None:
        def fuse(call: relax.Expr, matched: Matched) -> relax.Expr | None:
            source = matched.get(weight, matched.get(transposed))
            W = rewriting.weight(source)
            if W is None or W.ndim != 2 or W.dtype != np.float32 or len(call.ty.shape.values) < 2:
                return None
            if transposed in matched and not is_transpose(matched[turned]):
                return None
            if residual in matched and not same_shape(matched[residual].ty.shape.values, call.ty.shape.values):
                return None
            W = W.T if transposed in matched else W  # [K, N]
            K, N = W.shape
            if bias in matched and getattr(rewriting.weight(matched[bias]), "shape", None) != (N,):
                return None
            kernel = kernels.linear(
                K, N, activation=activation, residual=residual in matched, narrow=rewriting.is_narrowed(call)
            )
            if kernel is None:
                return None
            layout = "transposed.packed" if transposed in matched else "packed"
            packed = rewriting.add_weight(f"{rewriting.name(source)}.{layout}", lambda: kernels.pack_weight(W))
            name = rewriting.name(matched[bias]) if bias in matched else "none"
            table = rewriting.add_weight(
                f"{rewriting.name(source)}.{name}.table",
                lambda: kernels.table(W, rewriting.weights[name] if bias in matched else np.zeros(N, W.dtype)),
            )
            rest = [matched[residual]] if residual in matched else []
            return rewriting.call(
                "linear" + (f"_{activation}" if activation else "") + ("_residual" if rest else ""),
                kernel,
                [matched[x], packed, table, *rest],
                call,
            )

        rewriting.apply(pattern, fuse)

    rewrite(add_of(biased, residual))
    rewrite(add_of(product, residual))
    for name, activation in ACTIVATIONS.items():
        rewrite(is_op(name)(biased), activation=activation)
        rewrite(is_op(name)(product), activation=activation)
    rewrite(biased)
    rewrite(product)
    return rewriting.finish()
