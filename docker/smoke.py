"""Is this image whole, and right on this machine? Every check prints a line; the first that fails ends it.

docker run --rm IMAGE smoke                  # and with --gpus all, also on the GPU
"""

import argparse
import importlib
import importlib.util
import os
import pkgutil
import re
import sys
import tempfile
import time
from collections import defaultdict
from importlib.metadata import distributions
from pathlib import Path

import numpy as np
import torch
from check_archs import check_archs
from packaging.utils import canonicalize_name
from packaging.version import Version

from bench.correctness.agreement import compare_logits, odd_shapes, random_ids
from bench.correctness.reference import allowed_of, in_float64
from export.onnx import export_onnx
from gpt.checkpoint import save_checkpoint, seeded_checkpoint
from gpt.cli import UserError, run_command
from gpt.config import GPTConfig
from tvm_frontend.artifact import CompiledModel
from tvm_frontend.compile import compile_model
from tvm_frontend.cuda_toolchain import gpu_arch
from tvm_frontend.options import CompileOptions
from tvm_frontend.runtime import open_session

ROOT = Path(__file__).parents[1]
PACKAGES = ("bench", "export", "gpt", "tvm_frontend")
PYTEST_FILES = re.compile(r"bench\.(conftest|test_\w+)")  # need pytest, which is no part of the image
CONFIG = GPTConfig(block_size=64, vocab_size=65, n_layer=2, n_head=2, n_embd=64)
CUDA_LIBRARY = re.compile(
    r"lib(cublas|cublasLt|cudart|cudnn\w*|cufft|cufile|cupti|curand|cusolver|cusparse|cusparseLt|nccl|nvJitLink|nvrtc"
    r"|nvshmem_host)\.so[.\d]*"
)


def check_imports() -> str:
    """Import every module of the project. Raises ImportError."""
    names = [
        module.name
        for package in PACKAGES
        for module in pkgutil.walk_packages([str(ROOT / package)], f"{package}.")
        if not PYTEST_FILES.fullmatch(module.name)
    ]
    for name in names:
        importlib.import_module(name)
    return f"{len(names)} modules of the project import, with Python {sys.version.split()[0]}"


def check_pins() -> str:
    """Hold every installed package against constraints.txt. Raises RuntimeError for one of another version, or none."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    pins = {canonicalize_name(name): version for name, version in pairs}
    here = {canonicalize_name(each.name): each.version for each in distributions()}
    here.pop("pip")
    # A local version (2.13.0+cpu) is the same release, built otherwise.
    wrong = [
        f"{name} {version} (pinned: {pins.get(name, 'not')})"
        for name, version in sorted(here.items())
        if name not in pins or Version(version).public != Version(pins[name]).public
    ]
    if wrong:
        raise RuntimeError(f"not as constraints.txt pins them: {', '.join(wrong)}")
    return f"{len(here)} packages are installed, each as constraints.txt pins it; torch is {torch.__version__}"


def check_cuda_libraries() -> str:
    """Find NVIDIA's libraries on the whole file system. Raises RuntimeError if one is there twice."""
    found = defaultdict(set)
    for folder, folders, files in os.walk("/"):
        if folder == "/":
            folders[:] = [name for name in folders if name not in ("proc", "sys", "dev", "tmp")]
        if folder.endswith("triton/backends/nvidia"):
            folders.clear()  # Triton's own profiling libraries, of the CUDA versions that it was built with
        for name in files:
            if match := CUDA_LIBRARY.fullmatch(name):
                found[match[1]].add(Path(folder, name).resolve())
    if twice := {name: paths for name, paths in found.items() if len(paths) > 1}:
        raise RuntimeError(f"NVIDIA's libraries are here more than once: {twice}")
    size = sum(path.stat().st_size for paths in found.values() for path in paths)
    return f"{len(found)} CUDA libraries, each once, {size / 1e6:.0f} MB: {', '.join(sorted(found))}"


def export_seeded(checkpoint: Path, exported: Path) -> str:
    """Write a model of random weights as ONNX, and run it in ONNX Runtime. Raises RuntimeError for wrong numbers."""
    save_checkpoint(checkpoint, seeded_checkpoint(CONFIG))
    export_onnx(checkpoint, exported)
    return "ONNX Runtime agrees with PyTorch on what was exported"


def check_cpu(exported: Path) -> str:
    """Compile for this CPU and run it. Raises RuntimeError if the numbers are wrong."""
    return f"llvm on this CPU {check_numbers(compile_model(exported), 'fp32')}"


def check_gpu(exported: Path) -> str:
    """Compile for the GPU that is here and run it. Raises RuntimeError if the numbers are wrong."""
    arch = gpu_arch()
    if arch is None:
        return "no GPU is visible here, so nothing ran on one (docker run --gpus all shows it NVIDIA's)"
    if torch.version.cuda and not torch.cuda.is_available():
        raise RuntimeError(f"the driver shows a GPU ({arch}), and torch, built for CUDA {torch.version.cuda}, none")
    model = compile_model(exported, options=CompileOptions(target="cuda", arch=arch))
    return f"cuda on this {arch} {check_numbers(model, 'bf16')}"


def check_numbers(model: CompiledModel, precision: str) -> str:
    """Run a compiled model and hold its logits against eager PyTorch in float64. Raises RuntimeError."""
    checkpoint = seeded_checkpoint(CONFIG)
    eager, allowed = in_float64(checkpoint), allowed_of(checkpoint, precision)
    session, share = open_session(model, threads=1), 0.0
    for B, T in odd_shapes(CONFIG):
        ids = random_ids(CONFIG, B, T, seed=0)
        with torch.inference_mode():
            reference = eager(torch.from_numpy(ids)).numpy()
        agreement = compare_logits(reference, np.array(session.prefill(ids)), allowed)
        if not agreement.agrees:
            raise RuntimeError(f"{model.path} at B={B}, T={T}: {agreement.reason}")
        share = max(share, agreement.share_of_allowed)
    return f"agrees with PyTorch in float64: errors are up to {share:.0%} of what is allowed"


def main() -> None:
    """Run all checks, in order of what they need."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sm_86", help="what to compile for, as sm_86,sm_89 (default: sm_86)")
    archs = parser.parse_args().arch.split(",")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, exported = Path(folder, "ckpt.pt"), Path(folder, "model.onnx")
        checks = {
            "imports": check_imports,
            "pins": check_pins,
            "CUDA": check_cuda_libraries,
            "compile": lambda: "; ".join(check_archs(archs)),
            "export": lambda: export_seeded(checkpoint, exported),
            "CPU": lambda: check_cpu(exported),
            "GPU": lambda: check_gpu(exported),
        }
        for name, check in checks.items():
            began = time.monotonic()
            try:
                line = check()
            except UserError as error:
                raise UserError(f"{name}: {error}") from error
            print(f"{name:8} {line} ({time.monotonic() - began:.1f} s)")
    print("smoke: all is well")


if __name__ == "__main__":
    run_command(main)
