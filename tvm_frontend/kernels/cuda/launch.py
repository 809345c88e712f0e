"""How TensorIR starts the kernels of `device/`: it decides the blocks and threads, they do the work.

The kernels are CUDA C++, which is what mma.sync, ldmatrix and cp.async are written for. TVM emits a `__global__`
function of one call for each launch, and `source` goes in front of it when the module becomes machine code.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from tvm.ir import Expr
from tvm.script import tirx as T

DEVICE = Path(__file__).with_name("device")
FILES = ("primitives", "linear", "attention", "cached_attention", "rows", "sampling")  # each uses those before it
NAMESPACE = "gpt_frontend"


@cache
def source() -> str:
    """All of the kernels' source, to be compiled in front of what TVM emits."""
    return "\n".join((DEVICE / f"{name}.cuh").read_text() for name in FILES)


class Launcher:
    """Makes launches on a GPU. A test's own makes calls of the same kernels on the CPU."""

    def launch(self, function: str, threads: int, shared_bytes: int = 0) -> Callable:
        """A macro (x, y, z, arguments): start x · y · z blocks of a kernel.

        function: its name with its template arguments. arguments: pointers and numbers, after which comes, if it is to
        have shared memory, the pointer to that.
        """
        name = f"{NAMESPACE}::{function}"

        def call(arguments: Sequence[Expr], *shared: Expr) -> Expr:
            return T.call_extern("int32", name, *arguments, *shared)

        @T.macro
        def start(x, y, z, arguments):
            for _x in T.thread_binding(x, "blockIdx.x"):
                for _y in T.thread_binding(y, "blockIdx.y"):
                    for _z in T.thread_binding(z, "blockIdx.z"):
                        for _t in T.thread_binding(threads, "threadIdx.x"):
                            if shared_bytes > 0:
                                shared = T.alloc_buffer((shared_bytes,), "uint8", scope="shared.dyn")
                                T.evaluate(call(arguments, shared.data))
                            else:
                                T.evaluate(call(arguments))

        return start


def stored_as(dtype: str, number: str) -> str:
    """How a kernel stores results of a dtype, in C++. number: the type of `device/primitives.cuh` if it is narrow."""
    return "Wide" if dtype == "float32" else f"Narrow<{NAMESPACE}::{number}>"


def template(name: str, *arguments: str | int | bool) -> str:
    """The name of a template with its arguments in C++: types by their names in NAMESPACE."""
    words = [f"{NAMESPACE}::{each}" if isinstance(each, str) else str(each).lower() for each in arguments]
    return f"{name}<{', '.join(words)}>"
