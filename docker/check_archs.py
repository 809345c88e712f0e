"""Is what is compiled for an NVIDIA GPU really machine code for it? A small model, by every CUDA compiler that is here.

python docker/check_archs.py sm_86,sm_89            # no GPU is needed; -o FILE writes what it found
"""

import argparse
import tempfile
from pathlib import Path

from export.onnx import export_onnx
from gpt.checkpoint import save_checkpoint, seeded_checkpoint
from gpt.cli import UserError, run_command
from gpt.config import GPTConfig
from tvm_frontend.compile import compile_model
from tvm_frontend.cuda_toolchain import CudaCompiler, cubin_archs, find_compiler
from tvm_frontend.inspect import MATRIX, read_kernels
from tvm_frontend.options import CompileOptions

CONFIG = GPTConfig(block_size=64, vocab_size=65, n_layer=1, n_head=2, n_embd=128)


def check_archs(archs: list[str]) -> list[str]:
    """Compile for each arch with each compiler and read the machine code back: a line each.

    Raises UserError for an arch that a compiler does not know and where there is no compiler, RuntimeError if the
    library holds code for another arch, or none that uses tensor cores.
    """
    lines = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_checkpoint(folder / "ckpt.pt", seeded_checkpoint(CONFIG))
        exported = export_onnx(folder / "ckpt.pt", folder / "model.onnx")
        for compiler in compilers_here():
            for arch in archs:
                options = CompileOptions(target="cuda", arch=arch, cuda_compiler=compiler.name)
                model = compile_model(exported.path, options=options)
                found = cubin_archs(model.library(arch).read_bytes())
                kernels = read_kernels(model.library(arch), model.launches)
                on_matrices = sum(kernel.count(MATRIX) > 0 for kernel in kernels)
                if found != {arch} or not on_matrices:
                    raise RuntimeError(
                        f"{compiler.path} was to compile for {arch}: the library holds code for {', '.join(found)}, "
                        f"and {on_matrices} of {len(kernels)} kernels use tensor cores"
                    )
                by = f"{compiler.name} ({compiler.path})"
                lines.append(f"{arch}: {len(kernels)} kernels, {on_matrices} on tensor cores, by {by}")
    return lines


def compilers_here() -> list[CudaCompiler]:
    """nvcc, NVRTC or both. Raises UserError without either."""
    first = find_compiler()
    if first.name == "nvrtc":
        return [first]
    try:
        return [first, find_compiler("nvrtc")]
    except UserError:
        return [first]


def main() -> None:
    """Check the archs of the command line; print what was found, and write it if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archs", help="names with commas between them, as sm_86,sm_89")
    parser.add_argument("-o", dest="output", type=Path, help="a file for what was found")
    arguments = parser.parse_args()
    text = "".join(f"{line}\n" for line in check_archs(arguments.archs.split(",")))
    print(text, end="")
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
