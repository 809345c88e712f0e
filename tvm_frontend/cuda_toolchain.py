"""Makes CUDA machine code on any machine: finds nvcc or NVRTC, compiles TVM's kernels for one arch, checks the result.

TVM turns kernels into machine code only where NVIDIA's driver is loaded; elsewhere it exports their source, which looks
compiled and is not. Here the compiler is called directly, with or without a driver:

    with cuda_machine_code(target.arch):
        executable = tvm.compile(module, target.to_tvm(), relax_pipeline=...)
    executable.export_library(path)
    verify_cuda_library(path, target.arch)
"""

import ctypes
import importlib.util
import math
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt.cli import UserError

if TYPE_CHECKING:
    import tvm

COMPILERS = ("auto", "nvcc", "nvrtc")
INSTALL_HINT = (
    "pip install nvidia-cuda-nvrtc==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85 (96 MB), or NVIDIA's"
    " CUDA toolkit with CUDA_HOME set to its folder"
)
TOOLS = {  # the programs that `find_tool` finds, each with how to install it
    "cuobjdump": "pip install nvidia-cuda-cuobjdump==13.2.86",
    "nvdisasm": "pip install nvidia-cuda-nvdisasm==13.2.86",
    "compute-sanitizer": "install NVIDIA's CUDA toolkit, and set CUDA_HOME to its folder",
}
MOST_LINES = 10  # of a compiler's log that an error quotes
_DEFAULT_TOOLKIT = Path("/usr/local/cuda")
_EM_CUDA = 190  # e_machine of NVIDIA's machine code (LLVM's llvm/BinaryFormat/ELF.h)


@dataclass(frozen=True)
class CudaCompiler:
    """A CUDA compiler on this machine. name: `nvcc` or `nvrtc`. path: the program, or the shared library."""

    name: str
    path: Path

    def archs(self) -> tuple[str, ...]:
        """List the archs that it compiles for, as `sm_86`."""
        if self.name == "nvcc":
            words = _run([str(self.path), "--list-gpu-code"]).split()
            return tuple(word for word in words if word.startswith("sm_"))
        library = ctypes.CDLL(str(self.path))
        count = ctypes.c_int()
        _nvrtc(library, "nvrtcGetNumSupportedArchs", ctypes.byref(count))
        numbers = (ctypes.c_int * count.value)()
        _nvrtc(library, "nvrtcGetSupportedArchs", numbers)
        return tuple(f"sm_{number}" for number in numbers)

    def compile(self, source: str, arch: str, *, fast_math: bool = False) -> bytes:
        """Compile CUDA C++ to a cubin for exactly `arch`. Raises RuntimeError with the compiler's log if it fails."""
        options = [f"-arch={arch}", "-std=c++17", *(["--use_fast_math"] if fast_math else [])]
        cubin = (_compile_nvcc if self.name == "nvcc" else _compile_nvrtc)(self.path, source, options)
        _check_archs(f"what {self.path} compiled", cubin_archs(cubin), arch)
        return cubin


def find_compiler(compiler: str = "auto") -> CudaCompiler:
    """Find the CUDA compiler: with `auto` nvcc if it is here, else NVRTC. Nothing is taken from a GPU or driver.

    Looks in CUDA_HOME and CUDA_PATH, on PATH (nvcc), in this Python's nvidia packages of CUDA 13, in /usr/local/cuda.
    Raises UserError that says what to install if there is none.
    """
    if compiler not in COMPILERS:
        raise UserError(f"CUDA compiler {compiler!r}: must be one of {', '.join(COMPILERS)}")
    for name, candidates in (("nvcc", _nvcc_candidates), ("nvrtc", _nvrtc_candidates)):
        if compiler in ("auto", name):
            for path in candidates():
                if path.is_file():
                    return CudaCompiler(name, path)
    wanted = "neither nvcc nor NVRTC" if compiler == "auto" else f"no {compiler}"
    raise UserError(f"target cuda needs a CUDA compiler, and {wanted} was found on this machine: {INSTALL_HINT}")


def find_tool(name: str) -> Path:
    """Find a program of NVIDIA's toolkit, one of TOOLS. Raises UserError if it is nowhere."""
    for path in _program_candidates(name):
        if path.is_file():
            return path
    raise UserError(f"{name} was not found on this machine: {TOOLS[name]}")


@contextmanager
def cuda_machine_code(
    arch: str, compiler: str = "auto", *, fast_math: bool = False, before: str = ""
) -> Iterator[dict[str, dict[str, Any]]]:
    """Make every CUDA kernel that TVM builds within the block machine code for exactly `arch`, never source or PTX.

    Works in any process, before or after TVM is imported, with or without a GPU; outside the block TVM is as it was.
    before: CUDA C++ that the kernels call, to be compiled in front of them. Yields a dict, which the builds fill: for
    each kernel the `function` of that source that it calls, if any, and the `threads` and `shared_bytes` of its blocks.
    Raises UserError at once if no compiler is found, or if it does not compile for `arch`.
    """
    found = find_compiler(compiler)
    if arch not in (known := found.archs()):
        raise UserError(f"{found.path} does not compile for {arch}; it knows {', '.join(known)}")
    import tvm_ffi

    from tvm_frontend.tvm_patches import replaced_cuda_build

    _load_module_class()
    launches: dict[str, dict[str, Any]] = {}
    machine_code_of = tvm_ffi.get_global_func("gpt_frontend.cuda_machine_code")

    def build(module, target, build_source):
        if (asked := str(target.attrs.get("arch", "none"))) != arch:
            raise ValueError(f"kernels for arch {asked} inside cuda_machine_code({arch!r})")
        source = build_source(module, target)
        launches.update(_launches_of(module))
        text = f"{before}\n{source.inspect_source('cuda')}"
        return machine_code_of(source, found.compile(text, arch, fast_math=fast_math))

    with replaced_cuda_build(build):
        yield launches


def verify_cuda_library(path: Path | str, arch: str) -> None:
    """Check that the exported library at `path` holds CUDA machine code for exactly `arch`; RuntimeError if not."""
    _check_archs(str(path), cubin_archs(Path(path).read_bytes()), arch)


def cubin_archs(data: bytes) -> set[str]:
    """List the archs of the cubins (NVIDIA's ELF files) anywhere in `data`, as `sm_86`.

    The arch is in e_flags: the low byte, or from ABI version 8 (CUDA 13) on the byte above it (LLVM's
    llvm/BinaryFormat/ELF.h, EF_CUDA_SM).
    """
    return {arch for arch, _ in cubins(data)}


def cubins(data: bytes) -> list[tuple[str, bytes]]:
    """Find the cubins anywhere in `data`, each with its arch."""
    found = []
    at = data.find(b"\x7fELF")
    while at >= 0:
        header = data[at : at + 64]
        if len(header) == 64 and struct.unpack_from("<H", header, 18)[0] == _EM_CUDA:
            programs, sections, flags = struct.unpack_from("<QQI", header, 32)
            program_size, program_count, section_size, section_count = struct.unpack_from("<HHHH", header, 54)
            end = max(programs + program_size * program_count, sections + section_size * section_count)
            arch = f"sm_{(flags >> 8 if header[8] >= 8 else flags) & 0xFF}"
            found.append((arch, data[at : at + end]))
        at = data.find(b"\x7fELF", at + 1)
    return found


def gpu_arch() -> str | None:
    """Ask NVIDIA's driver for the arch of this machine's first GPU, as `sm_86`; None without a driver or GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    major, minor, device = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    # 75 and 76: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h
    driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
    return f"sm_{major.value}{minor.value}"


def load_cuda_runtime() -> None:
    """Make TVM able to load and run CUDA libraries, also with a libcudart from PyPI, which TVM itself does not find.

    Raises UserError without NVIDIA's driver, a GPU or libcudart.
    """
    import tvm
    import tvm_ffi

    if tvm_ffi.get_global_func("ffi.Module.load_from_bytes.cuda", allow_missing=True):
        return
    if gpu_arch() is None:
        raise UserError("no NVIDIA driver with a GPU on this machine: run this artifact where there is one")
    for library in (folder / "libcudart.so.13" for folder in _library_folders()):
        if library.is_file():
            ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
            break
    try:
        ctypes.CDLL(str(Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"))
    except OSError as error:
        raise UserError(
            f"TVM's CUDA runtime does not load ({error}): pip install nvidia-cuda-runtime==13.0.96"
        ) from error


def _launches_of(module: "tvm.IRModule") -> dict[str, dict[str, Any]]:
    """Read the launches that `cuda_machine_code` yields from a module's kernels."""
    import tvm
    import tvm_ffi

    found, call_extern = {}, tvm.ir.Op.get("tirx.call_extern")
    for _, function in module.functions_items():
        threads: dict[str, int] = {}
        shared: list[int] = []
        called: list[str] = []

        def note_threads(node: "tvm.tirx.AttrStmt", threads: dict[str, int] = threads) -> None:
            if node.attr_key == "thread_extent" and (tag := str(node.node.thread_tag)).startswith("threadIdx"):
                threads[tag] = int(node.value)

        def note_shared(node: "tvm.tirx.AllocBuffer", shared: list[int] = shared) -> None:
            if str(node.buffer.scope()).startswith("shared"):
                size = math.prod(int(extent) for extent in node.buffer.shape)
                shared.append(size * np.dtype(str(node.buffer.dtype)).itemsize)

        def note_called(node: "tvm.ir.Call", called: list[str] = called) -> None:
            if node.op.same_as(call_extern):
                called.append(str(node.args[0].value))

        visits = [
            (tvm.tirx.AttrStmt, note_threads),
            (tvm.tirx.AllocBuffer, note_shared),
            (tvm.ir.Call, note_called),
        ]
        tvm_ffi.structural_walk(function.body, visits)
        name = str(function.attrs["global_symbol"])
        found[name] = {
            "function": called[0] if called else None,
            "threads": math.prod(threads.values()),
            "shared_bytes": sum(shared),
        }
    return found


def _nvcc_candidates() -> list[Path]:
    return _program_candidates("nvcc")


def _program_candidates(name: str) -> list[Path]:
    on_path = shutil.which(name)
    named, python, default = _toolkits()
    return [
        *(root / "bin" / name for root in named),
        *([Path(on_path)] if on_path else []),
        *(root / "bin" / name for root in python + default),
    ]


def _nvrtc_candidates() -> list[Path]:
    return [library for folder in _library_folders() for library in sorted(folder.glob("libnvrtc.so.1[0-9]"))]


def _library_folders() -> list[Path]:
    return [root / name for roots in _toolkits() for root in roots for name in ("lib64", "lib")]


def _toolkits() -> tuple[list[Path], list[Path], list[Path]]:
    """List folders laid out as a CUDA toolkit: named by the user, of this Python's packages, and the usual place."""
    named = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    packages = importlib.util.find_spec("nvidia")
    python = [Path(folder) / "cu13" for folder in (packages.submodule_search_locations or [])] if packages else []
    return named, python, [_DEFAULT_TOOLKIT]


def _compile_nvcc(nvcc: Path, source: str, options: list[str]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernels.cu").write_text(source)
        _run([str(nvcc), "-cubin", "-O3", *options, "-o", "kernels.cubin", "kernels.cu"], folder)
        return (Path(folder) / "kernels.cubin").read_bytes()


def _compile_nvrtc(library_path: Path, source: str, options: list[str]) -> bytes:
    for builtins in library_path.parent.glob("libnvrtc-builtins.so.[0-9]*"):
        ctypes.CDLL(str(builtins))  # NVRTC opens it by its name alone, and the loader does not search this folder
    library = ctypes.CDLL(str(library_path))
    include = library_path.parent.parent / "include"
    # -default-device: as nvcc does. INFINITY: NVRTC has no <math.h>.
    options = [*options, f"-I{include}", f"-I{include / 'cccl'}", "-default-device"]
    options.append("-DINFINITY=__int_as_float(0x7f800000)")
    arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    text = ctypes.c_char_p(source.encode())
    _nvrtc(library, "nvrtcCreateProgram", ctypes.byref(program), text, ctypes.c_char_p(b"kernels.cu"), 0, None, None)
    try:
        if library.nvrtcCompileProgram(program, len(options), arguments):
            _nvrtc(library, "nvrtcGetProgramLogSize", program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            _nvrtc(library, "nvrtcGetProgramLog", program, log)
            raise RuntimeError(f"NVRTC failed:\n{_errors_in(log.value.decode(errors='replace'))}")
        _nvrtc(library, "nvrtcGetCUBINSize", program, ctypes.byref(size))
        cubin = ctypes.create_string_buffer(size.value)
        _nvrtc(library, "nvrtcGetCUBIN", program, cubin)
        return cubin.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _nvrtc(library: ctypes.CDLL, function: str, *arguments: object) -> None:
    if code := getattr(library, function)(*arguments):
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise RuntimeError(f"{function}: {library.nvrtcGetErrorString(code).decode()}")


def _check_archs(where: str, found: set[str], arch: str) -> None:
    if found != {arch}:
        held = f"machine code for {', '.join(sorted(found))}" if found else "no CUDA machine code"
        raise RuntimeError(f"{where} holds {held}, and was to hold it for {arch}")


def _load_module_class() -> None:
    """Register `gpt_frontend.cuda_machine_code` by building cuda_module.cc, about two seconds once a process."""
    import tvm_ffi

    if tvm_ffi.get_global_func("gpt_frontend.cuda_machine_code", allow_missing=True):
        return
    code = Path(__file__).with_name("cuda_module.cc")
    includes = [f"-I{path}" for path in tvm_ffi.libinfo.include_paths()]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "cuda_module.so"
        _run(["g++", "-std=c++17", "-shared", "-fPIC", *includes, str(code), "-o", str(library)])
        ctypes.CDLL(str(library))


def _errors_in(log: str) -> str:
    """Take the first lines of a compiler's log that speak of errors, or its last ones: all of it can be 300 KB."""
    lines = log.splitlines()
    errors = [line for line in lines if "error" in line.lower()]
    return "\n".join(errors[:MOST_LINES] or lines[-MOST_LINES:])


def _run(command: list[str], folder: str | None = None) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    except OSError as error:
        raise UserError(f"cannot run {command[0]}: {error.strerror}; install it, or put it on PATH") from error
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{_errors_in(done.stdout + done.stderr)}")
    return done.stdout
