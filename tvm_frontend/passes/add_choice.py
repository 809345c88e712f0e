"""Adds a kernel that chooses the next token on a GPU to the library of a model with a cache."""

from tvm_frontend.graph import CHOOSE, ENTRY, HEAD, Graph
from tvm_frontend.kernels.cuda import CudaKernels
from tvm_frontend.passes.rewrite import with_root


def add_choice(graph: Graph, kernels: CudaKernels) -> Graph:
    """Add the kernel for logits of forward's vocabulary.

    The graph stays as it is without a cache, and without the head that `split_head` makes: prompts are padded, and the
    head is told the row of each that the next token comes from.
    """
    if not graph.caches or HEAD not in graph.entry_points:
        return graph
    result = graph.module[ENTRY].body.body
    kernel = kernels.sample(int(result.fields[0].ty.shape.values[-1]))
    module = graph.module.clone()
    module[CHOOSE] = with_root(kernel).with_attr("global_symbol", CHOOSE)
    return Graph(module, graph.weights)
