"""What the tests of the CUDA kernels share: their own source, run on the CPU by a model of a GPU's threads.

Where there is a GPU, the same cases run on it too; `python -m bench.gpu` reports them.
"""

import ctypes
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm.ir import Expr
from tvm.script import tirx as T

from tvm_frontend.cuda_toolchain import cuda_machine_code, gpu_arch, load_cuda_runtime
from tvm_frontend.kernels.cuda.launch import DEVICE, FILES, NAMESPACE, Launcher, source
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
def emulated() -> EmulatedLauncher:
    return EmulatedLauncher()


@pytest.fixture(params=["emulated", "on_gpu"])
def launcher(request: pytest.FixtureRequest) -> Launcher:
    if request.param == "emulated":
        return EmulatedLauncher()
    if gpu_arch() is None:
        pytest.skip("no NVIDIA driver with a GPU on this machine")
    return Launcher()


@pytest.fixture
def build(launcher: Launcher, tmp_path: Path) -> Callable[[tvm.tirx.PrimFunc], tuple[tvm.runtime.Device, Callable]]:
    """Compile a kernel made with `launcher`: the device that it runs on, and a function of tensors there."""

    def build_kernel(kernel: tvm.tirx.PrimFunc) -> tuple[tvm.runtime.Device, Callable]:
        module = tvm.IRModule({"run": kernel.with_attr("global_symbol", "run")})
        if isinstance(launcher, EmulatedLauncher):
            launcher.load(tmp_path)
            return tvm.cpu(), tvm.compile(module, resolve_target().to_tvm())["run"]
        arch, library = gpu_arch(), tmp_path / "kernel.so"
        with cuda_machine_code(arch, before=source()):
            tvm.compile(module, resolve_target("cuda", arch=arch).to_tvm()).export_library(str(library))
        load_cuda_runtime()
        return tvm.cuda(), tvm_ffi.load_module(library)["run"]

    return build_kernel


@pytest.fixture
def run_in_place(build: Callable) -> Callable[..., list[np.ndarray]]:
    """Run a kernel on arrays, some of which it writes to, behind the others.

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
        device, function = build(kernel)
        # What a kernel forgets to write stays NaN.
        *inputs, out = (to_tensor(each, device) for each in (*arguments, *written, np.full(shape, np.nan, dtype)))
        function(*inputs, out)
        in_place = inputs[len(arguments) :]
        return [to_float64(out), *(tensor.numpy() for tensor in in_place)]

    return run_kernel


@pytest.fixture
def run(run_in_place: Callable[..., list[np.ndarray]]) -> Callable[..., np.ndarray]:
    """The same of a kernel that writes its result alone."""
    return lambda kernel, *arguments, **result: run_in_place(kernel, arguments, [], **result)[0]


@pytest.fixture
def within(record_property: Callable[[str, object], None]) -> Callable[..., bool]:
    """Whether errors are within a tolerance, a number or one for each; the largest, in tolerances, is recorded."""

    def check(found: np.ndarray, expected: np.ndarray, tolerance: np.ndarray | float) -> bool:
        largest = float((np.abs(found - expected) / tolerance).max())
        record_property("error_of_tolerance", largest)
        return largest <= 1

    return check


def to_tensor(array: np.ndarray, device: tvm.runtime.Device) -> tvm.runtime.Tensor:
    """On a device, of the same dtype, which numpy may only know from ml_dtypes."""
    tensor = tvm.runtime.empty(array.shape, str(array.dtype), device)
    return tensor.copyfrom(array)


def to_float64(tensor: tvm.runtime.Tensor) -> np.ndarray:
    array = tensor.numpy()
    if array.dtype == np.uint16:
        array = array.view(ml_dtypes.bfloat16)
    return array.astype(np.float64)


@pytest.hookimpl(tryfirst=True)  # before -m selects by the mark
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder slow: each compiles C++ for the emulator of a GPU."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.slow)
