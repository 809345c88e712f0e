"""What the tests of the CUDA kernels share: their own source, run on the CPU by a model of a GPU's threads."""

import ctypes
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tvm
from tvm.ir import Expr
from tvm.script import tirx as T

from tvm_frontend.schedules.cuda.launch import DEVICE, FILES, NAMESPACE, Launcher
from tvm_frontend.target import resolve_target

EMULATOR = Path(__file__).with_name("emulator.h")
C_TYPES = {"handle": "void*", "int32": "int", "int64": "long long", "float32": "float"}


class EmulatedLauncher(Launcher):
    """Launches become calls of C functions, each of which runs all blocks of one kernel on the CPU."""

    def __init__(self) -> None:
        self.entries: dict[str, str] = {}  # symbol to C++

    def launch(self, function: str, threads: int, shared_bytes: int = 0) -> Callable:
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
        """Compile all that was launched so far, and make it found by libraries that are loaded from now on."""
        kernels = [(DEVICE / f"{name}.cuh").read_text() for name in FILES if name != "primitives"]
        source, library = folder / "kernels.cc", folder / "kernels.so"
        source.write_text("\n".join([EMULATOR.read_text(), *kernels, *self.entries.values()]))
        command = [
            "g++",
            "-std=c++17",
            "-O2",
            "-w",
            "-U_FORTIFY_SOURCE",
            "-shared",
            "-fPIC",
            str(source),
            "-o",
            str(library),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


def _c_type(argument: Expr) -> str:
    dtype = str(getattr(argument, "dtype", None) or argument.ty)
    return C_TYPES.get(dtype, "void*")


@pytest.fixture
def launcher() -> EmulatedLauncher:
    return EmulatedLauncher()


@pytest.fixture
def run_in_place(launcher: EmulatedLauncher, tmp_path: Path) -> Callable[..., list[np.ndarray]]:
    """Run a kernel made with `launcher` on arrays, some of which it writes to, behind the others.

    Gives back the result, of a shape and dtype, in float64, and what was written to as it then is.
    """

    def run_kernel(
        kernel: tvm.tirx.PrimFunc,
        arguments: Sequence[np.ndarray],
        written: Sequence[np.ndarray],
        *,
        shape: tuple[int, ...],
        dtype: str = "float32",
    ) -> list[np.ndarray]:
        launcher.load(tmp_path)
        module = tvm.IRModule({"run": kernel.with_attr("global_symbol", "run")})
        library = tvm.compile(module, resolve_target().to_tvm())
        out, in_place = tvm.runtime.empty(shape, dtype), [to_tensor(each) for each in written]
        library["run"](*map(to_tensor, arguments), *in_place, out)
        return [to_float64(out), *(tensor.numpy() for tensor in in_place)]

    return run_kernel


@pytest.fixture
def run(run_in_place: Callable[..., list[np.ndarray]]) -> Callable[..., np.ndarray]:
    """The same of a kernel that writes its result alone."""
    return lambda kernel, *arguments, **result: run_in_place(kernel, arguments, [], **result)[0]


def to_tensor(array: np.ndarray) -> tvm.runtime.Tensor:
    """On the CPU, of the same dtype, which numpy may only know from ml_dtypes."""
    tensor = tvm.runtime.empty(array.shape, str(array.dtype))
    return tensor.copyfrom(array)


def to_float64(tensor: tvm.runtime.Tensor) -> np.ndarray:
    array = tensor.numpy()
    if array.dtype == np.uint16:
        array = array.view(ml_dtypes.bfloat16)
    return array.astype(np.float64)
