"""What the machine did get: the kernels of a compiled CUDA library, read from their machine code, and their floors.

python -m tvm_frontend.inspect artifacts/tvm-sm_86-O3       # on any machine; none needs a GPU
"""

import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tabulate import tabulate

from gpt.cli import UserError, run_command
from gpt.files import find_input
from tvm_frontend.artifact import RELAY, CompiledModel, load_compiled
from tvm_frontend.cuda_toolchain import cubins, find_tool
from tvm_frontend.kernels.cuda.launch import NAMESPACE
from tvm_frontend.kernels.cuda.roofline import Shape, work_of

# What a multiprocessor has: threads, registers, bytes of shared memory, blocks (CUDA programming guide, compute
# capabilities). A block takes 1 KB of shared memory more than it asks for.
MULTIPROCESSOR = {
    "sm_75": (1024, 65536, 64 << 10, 16),
    "sm_80": (2048, 65536, 164 << 10, 32),
    "sm_86": (1536, 65536, 100 << 10, 16),
    "sm_87": (1536, 65536, 164 << 10, 16),
    "sm_89": (1536, 65536, 100 << 10, 24),
    "sm_90": (2048, 65536, 228 << 10, 32),
    "sm_100": (2048, 65536, 228 << 10, 32),
    "sm_120": (1536, 65536, 100 << 10, 24),
}
BLOCK_OVERHEAD = 1 << 10


@dataclass(frozen=True)
class Gpu:
    """A product, by what its maker states. bytes_per_s: of its memory. flops_per_s: of its tensor cores at most.

    Of matrices without sparsity with sums in float32: of 16-bit numbers, and of tf32.
    """

    name: str
    arch: str
    bytes_per_s: float
    flops_per_s: float
    tf32_flops_per_s: float


# NVIDIA's data sheets (A100 80 GB, A40, L40S, H100 and H200 SXM) and its whitepapers of the architectures GA102 (RTX
# 3090), Ada (RTX 4090) and RTX Blackwell (RTX 5090).
GPUS = (
    Gpu("A100", "sm_80", 2039e9, 312e12, 156e12),
    Gpu("RTX 3090", "sm_86", 936e9, 71e12, 35.6e12),
    Gpu("A40", "sm_86", 696e9, 149.7e12, 74.8e12),
    Gpu("RTX 4090", "sm_89", 1008e9, 165.2e12, 82.6e12),
    Gpu("L40S", "sm_89", 864e9, 362e12, 183e12),
    Gpu("H100", "sm_90", 3350e9, 989e12, 494e12),
    Gpu("H200", "sm_90", 4800e9, 989e12, 494e12),
    Gpu("RTX 5090", "sm_120", 1792e9, 209.5e12, 104.8e12),
)
MATRIX, COPY, LOAD = "HMMA", "LDGSTS", "LDSM"  # mma.sync, cp.async, ldmatrix
SPILLS = ("LDL", "STL")  # loads and stores of local memory


@dataclass(frozen=True)
class KernelCode:
    """One kernel of a cubin.

    function: what it calls of NAMESPACE, this project's source, None if TVM wrote it. registers: a thread's. threads,
    shared_bytes: a block's. instructions: by their opcode.
    """

    name: str
    function: str | None
    arch: str
    registers: int
    threads: int
    shared_bytes: int
    instructions: Counter[str]

    def count(self, *names: str) -> int:
        """How often instructions whose opcode begins so are in the code."""
        return sum(n for opcode, n in self.instructions.items() if opcode.split(".")[0] in names)

    @property
    def spills(self) -> int:
        """Instructions that go to local memory."""
        return self.count(*SPILLS)

    @property
    def occupancy(self) -> float | None:
        """The share of a multiprocessor's threads that can be there at a time; None for an arch not in the table."""
        if self.arch not in MULTIPROCESSOR:
            return None
        threads, registers, shared, blocks = MULTIPROCESSOR[self.arch]
        # Registers are given to a warp by 256.
        of_block = -(-self.registers * 32 // 256) * 256 * -(-self.threads // 32)
        fit = min(
            blocks, threads // self.threads, registers // of_block, shared // (self.shared_bytes + BLOCK_OVERHEAD)
        )
        return fit * self.threads / threads


def read_kernels(library: Path, launches: dict[str, dict[str, Any]]) -> list[KernelCode]:
    """Every kernel in a library, in the order of its machine code.

    launches: of `CompiledModel`, what is not in the code. Raises UserError without NVIDIA's tools to read it.
    """
    dump = find_tool("cuobjdump")
    disassembler = find_tool("nvdisasm")  # which the first one calls, by the search path
    environment = os.environ | {"PATH": f"{disassembler.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for arch, code in cubins(library.read_bytes()):
            file = Path(folder, "kernels.cubin")
            file.write_bytes(code)
            usage, text = (
                subprocess.run(
                    [str(dump), option, str(file)], capture_output=True, text=True, check=True, env=environment
                ).stdout
                for option in ("-res-usage", "-sass")
            )
            registers = {name: int(n) for name, n in re.findall(r"Function (\S+):\s+REG:(\d+)", usage)}
            for part in text.split("Function : ")[1:]:
                name, _, body = part.partition("\n")
                opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)", body, re.MULTILINE)
                launch = launches[name.strip()]
                function = launch["function"] and launch["function"].replace(f"{NAMESPACE}::", "")
                found.append(
                    KernelCode(
                        name.strip(), function, arch, registers[name.strip()], launch["threads"],
                        launch["shared_bytes"], Counter(opcodes),
                    )
                )  # fmt: skip
    return found


def code_table(kernels: list[KernelCode]) -> str:
    """The machine code of the kernels in columns, for people."""
    head = ("kernel", "instructions", MATRIX, COPY, LOAD, "spills", "registers", "threads", "shared KB", "occupancy")
    rows = [
        (
            kernel.name, str(sum(kernel.instructions.values())), *(str(kernel.count(n)) for n in (MATRIX, COPY, LOAD)),
            str(kernel.spills), str(kernel.registers), str(kernel.threads), f"{kernel.shared_bytes / 1024:.1f}",
            "–" if kernel.occupancy is None else f"{kernel.occupancy:.0%}",
        )
        for kernel in kernels
    ]  # fmt: skip
    return _columns([head, *rows])


def work_table(kernels: list[KernelCode], shape: Shape) -> str:
    """What a launch of each of our own kernels must do at a shape, and the least time for it on GPUs of its arch.

    That is its FLOPs over what the tensor cores can do, or its bytes over what the memory can give, whichever is more.
    Kernels that are not started at that shape are left out.
    """
    gpus = [gpu for gpu in GPUS if gpu.arch == kernels[0].arch]
    rows = [("kernel", "GFLOP", "MB", *(f"{gpu.name} µs" for gpu in gpus), "what it is")]
    for kernel in kernels:
        work = work_of(kernel.function, shape) if kernel.function else None
        if work is None:
            continue
        floors = (
            max(work.flops / (gpu.tf32_flops_per_s if "Tf32" in kernel.function else gpu.flops_per_s),
                work.bytes / gpu.bytes_per_s)
            for gpu in gpus
        )  # fmt: skip
        numbers = [f"{work.flops / 1e9:.3f}", f"{work.bytes / 1e6:.2f}", *(f"{floor * 1e6:.2f}" for floor in floors)]
        rows.append((kernel.name, *numbers, kernel.function))
    return _columns(rows)


def _columns(rows: list[tuple[str, ...]]) -> str:
    """Align words to the left and numbers to the right."""
    has_numbers = [any(row[i][:1].isdigit() for row in rows[1:]) for i in range(len(rows[0]))]
    alignment = ["right" if numbers else "left" for numbers in has_numbers]
    return tabulate(rows[1:], rows[0], "plain", colalign=alignment, disable_numparse=True)


def inspect_command(
    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")],
    batch: Annotated[int, tyro.conf.arg(metavar="B")] = 1,
    tokens: Annotated[
        int | None, tyro.conf.arg(metavar="T", help_behavior_hint="(default: block_size, with a cache 1)")
    ] = None,
    context: Annotated[
        int | None, tyro.conf.arg(metavar="T", help_behavior_hint="(default: what block_size leaves)")
    ] = None,
) -> None:
    """Show the machine code of a model compiled for an NVIDIA GPU, and what its kernels must do: a line a kernel.

    HMMA multiplies matrices, LDGSTS copies to shared memory behind the work, LDSM reads matrices from there; spills go
    to memory what the registers do not hold. Occupancy is the share of a multiprocessor's threads that fit at a time.
    The second table has the FLOPs and bytes of one launch, and the least time that GPUs of that arch can take for them.

    Args:
        model: a folder written by python -m tvm_frontend.compile --target cuda
        batch: sequences, for the second table
        tokens: new ones of each sequence
        context: tokens of each sequence that are in the cache
    """
    compiled = load_compiled(find_input(model))
    if compiled.target["kind"] != "cuda":
        raise UserError(f"{model}: compiled for {compiled.target['kind']}; this command reads the code of GPUs")
    if compiled.frontend == RELAY:
        raise UserError(f"{model}: compiled by Relay, which does not tell how its kernels are launched")
    shape = _shape(compiled, batch, tokens, context)
    for library in compiled.libraries:
        kernels = read_kernels(library, compiled.launches)
        print(f"{kernels[0].arch}, {len(kernels)} kernels:\n{code_table(kernels)}\n")
        if any(kernel.function for kernel in kernels):
            behind = f" behind {shape.context} in the cache" if compiled.form == "cached" else ""
            print(f"one launch, B={shape.B}, T={shape.T}{behind}:\n{work_table(kernels, shape)}\n")


def _shape(compiled: CompiledModel, batch: int, tokens: int | None, context: int | None) -> Shape:
    """The shape that the user's words mean for a model. Raises UserError for one that it does not take."""
    block_size, cached = compiled.config.block_size, compiled.form == "cached"
    if context and not cached:
        raise UserError("--context: this model was compiled without a cache; leave it out")
    tokens = tokens if tokens is not None else 1 if cached else block_size
    context = context if context is not None else block_size - tokens if cached else 0
    if batch < 1 or tokens < 1 or context < 0 or tokens + context > block_size:
        raise UserError(
            f"B={batch}, T={tokens}, context={context}: B and T must be at least 1, and T with the context at most "
            f"block_size={block_size}"
        )
    return Shape(batch, tokens, context)


def main() -> None:
    """Parse the command line and show."""
    tyro.cli(inspect_command, prog="python -m tvm_frontend.inspect")


if __name__ == "__main__":
    run_command(main)
