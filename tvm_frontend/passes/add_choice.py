"""A GPU chooses the next token itself: the library of a model with a cache has a kernel for it beside the functions."""

from tvm import relax

from tvm_frontend.graph import CHOOSE, ENTRY, Graph
from tvm_frontend.passes.rewrite import with_root
from tvm_frontend.schedules.cuda import CudaKernels


def add_choice(graph: Graph, kernels: CudaKernels) -> Graph:
    """The kernel for logits of forward's vocabulary; the graph stays as it is without a cache."""
    result = graph.module[ENTRY].body.body
    if not graph.caches or not isinstance(result, relax.Tuple):
        return graph
    kernel = kernels.choose(int(result.fields[0].ty.shape.values[-1]))
    module = graph.module.clone()
    module[CHOOSE] = with_root(kernel).with_attr("global_symbol", CHOOSE)
    return Graph(module, graph.weights)
