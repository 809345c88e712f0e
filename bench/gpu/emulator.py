"""Run the CUDA kernels' own source on the CPU, by an emulation of a GPU's threads; see `emulator.h`."""

import ctypes
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from tvm.ir import Expr
from tvm.script import tirx as T

from tvm_frontend.kernels.cuda.launch import DEVICE, FILES, NAMESPACE, Launcher

EMULATOR = Path(__file__).with_name("emulator.h")
C_TYPES = {"handle": "void*", "int32": "int", "int64": "long long", "float32": "float"}


class EmulatedLauncher(Launcher):
    """Makes calls of C functions in the place of launches; each runs all blocks of one kernel on the CPU."""

    def __init__(self) -> None:
        self.entries: dict[str, str] = {}  # C++ source by symbol

    def launch(self, function: str, threads: int, shared_bytes: int = 0) -> Callable:
        """Return a macro (x, y, z, arguments) that calls the emulated kernel, and note the C function that it needs."""

        def call(x: Expr | int, y: Expr | int, z: Expr | int, arguments: Sequence[Expr]) -> Expr:
            types = [_c_type(argument) for argument in arguments]
            symbol = f"emulated_{abs(hash((function, *types)))}"
            names = [f"a{i}" for i in range(len(types))]
            parameters = ", ".join(f"{type_} {name}" for type_, name in zip(types, names, strict=True))
            given = ", ".join([*names, *(["shared"] if shared_bytes else [])])
            self.entries[symbol] = (
                f'extern "C" int {symbol}(long long x, long long y, long long z, {parameters}) {{\n'
                f"  emulator::run(x, y, z, {threads}, {shared_bytes},\n"
                f"    [&](void* shared) {{ {NAMESPACE}::{function}({given}); }});\n  return 0;\n}}\n"
            )
            sizes = [T.int64(size) if isinstance(size, int) else T.Cast("int64", size) for size in (x, y, z)]
            return T.call_extern("int32", symbol, *sizes, *arguments)

        @T.macro
        def start(x, y, z, arguments):
            T.evaluate(call(x, y, z, arguments))

        return start

    def load(self, folder: Path) -> None:
        """Compile all kernels launched so far into `folder` and load them, so that later libraries find their symbols.

        Raises RuntimeError with the compiler's messages if it fails.
        """
        kernels = [(DEVICE / f"{name}.cuh").read_text() for name in FILES if name != "primitives"]
        source, library = folder / "kernels.cc", folder / "kernels.so"
        source.write_text("\n".join([EMULATOR.read_text(), *kernels, *self.entries.values()]))
        options = ["-std=c++17", "-O2", "-w", "-U_FORTIFY_SOURCE", "-shared", "-fPIC"]
        done = subprocess.run(["g++", *options, str(source), "-o", str(library)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"g++ failed on the emulated kernels:\n{done.stderr}")
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


def _c_type(argument: Expr) -> str:
    dtype = str(getattr(argument, "dtype", None) or argument.ty)
    return C_TYPES.get(dtype, "void*")
