"""Launches of the CUDA C++ kernels in `device/` from TensorIR.

The kernels are CUDA C++, because mma.sync, ldmatrix and cp.async are not within reach of TensorIR's schedules. TensorIR
decides the grid: TVM emits for each launch a `__global__` function that only calls the kernel, and `source` is put in
front of it when the module becomes machine code.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from tvm.ir import Expr
from tvm.script import tirx as T

DEVICE = Path(__file__).with_name("device")
FILES = ("primitives", "linear", "attention", "cached_attention", "norm_embed", "sampling")  # in order of dependence
NAMESPACE = "gpt_frontend"


@cache
def source() -> str:
    """Return the source of all kernels, to be compiled in front of what TVM emits."""
    return "\n".join((DEVICE / f"{name}.cuh").read_text() for name in FILES)


class Launcher:
    """Makes launches for a GPU. The emulator of the tests makes calls of the same kernels on the CPU instead."""

    def launch(self, function: str, threads: int, shared_bytes: int = 0) -> Callable:
        """Return a macro (x, y, z, arguments) that launches a kernel on a grid of x · y · z blocks.

        function: the kernel's name with its template arguments, as `template` spells it. threads, shared_bytes: of one
        block. arguments: pointers and scalars; if shared_bytes > 0, the pointer to shared memory is appended to them.
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


def store_policy(dtype: str, traits: str) -> str:
    """Spell the C++ type that stores results of a dtype. traits: the DTypeTraits of 16-bit results."""
    return "StoreF32" if dtype == "float32" else f"StoreHalf<{NAMESPACE}::{traits}>"


def template(name: str, *arguments: str | int | bool) -> str:
    """Spell a C++ template with its arguments; strings are types of NAMESPACE."""
    words = [f"{NAMESPACE}::{each}" if isinstance(each, str) else str(each).lower() for each in arguments]
    return f"{name}<{', '.join(words)}>"
