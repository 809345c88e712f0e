"""Read the kernels of a compiled CUDA library from their machine code, and compute the roofline time of each.

python -m tvm_frontend.inspect artifacts/tvm-sm_86-O3       # on any machine; no GPU is needed
"""

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is one line too
    from gpt.cli import run_main

    run_main("tvm_frontend.inspect", prints=True)

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

from gpt.cli import UserError
from gpt.files import find_input
from gpt.hardware import ARCHS, BLOCK_RESERVED_SHARED_BYTES, GPUS, REGISTERS_UNIT, WARP_LANES
from tvm_frontend.artifact import RELAY, CompiledModel, load_compiled
from tvm_frontend.cuda_toolchain import cubins, find_tool
from tvm_frontend.kernels.cuda.launch import NAMESPACE
from tvm_frontend.kernels.cuda.roofline import Shape, work_of

MATRIX, COPY, LOAD = "HMMA", "LDGSTS", "LDSM"  # mma.sync, cp.async, ldmatrix
SPILLS = ("LDL", "STL")  # loads and stores of local memory


@dataclass(frozen=True)
class KernelCode:
    """One kernel of a cubin.

    function: the kernel of this project that it calls, with its template arguments; None if TVM generated its code.
    registers: of one thread. threads, shared_bytes: of one block. instructions: how often each opcode occurs.
    """

    name: str
    function: str | None
    arch: str
    registers: int
    threads: int
    shared_bytes: int
    instructions: Counter[str]

    def count(self, *names: str) -> int:
        """Count the instructions whose opcode, up to its first dot, is one of `names`."""
        return sum(n for opcode, n in self.instructions.items() if opcode.split(".")[0] in names)

    @property
    def spills(self) -> int:
        """The number of instructions that access local memory."""
        return self.count(*SPILLS)

    @property
    def occupancy(self) -> float | None:
        """The share of a multiprocessor's threads that its blocks can fill; None if the arch's limits are not known."""
        arch = ARCHS.get(self.arch)
        if arch is None or arch.limits is None:
            return None
        limits, warps = arch.limits, -(-self.threads // WARP_LANES)
        registers_of_warp = -(-self.registers * WARP_LANES // REGISTERS_UNIT) * REGISTERS_UNIT
        blocks = min(
            limits.blocks,
            limits.threads // self.threads,
            limits.registers // (registers_of_warp * warps),
            limits.shared_bytes // (self.shared_bytes + BLOCK_RESERVED_SHARED_BYTES),
        )
        return blocks * self.threads / limits.threads


def read_kernels(library: Path, launches: dict[str, dict[str, Any]]) -> list[KernelCode]:
    """Read every kernel of a library, in the order of its machine code.

    launches: as in `CompiledModel`; it has what the code does not say. Raises UserError without NVIDIA's tools.
    """
    dump = find_tool("cuobjdump")
    disassembler = find_tool("nvdisasm")  # cuobjdump looks it up on PATH
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
    """Format the counts of instructions and the resources of each kernel as columns."""
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
    """Format the work of one launch of each of this project's kernels, and its roofline time on GPUs of its arch.

    The roofline time is the larger of FLOPs over the rate of the tensor cores and bytes over the memory's bandwidth.
    Kernels that are not launched at the shape are left out.
    """
    gpus = [gpu for gpu in GPUS if gpu.arch == kernels[0].arch]
    rows = [("kernel", "GFLOP", "MB", *(f"{gpu.name} µs" for gpu in gpus), "what it is")]
    for kernel in kernels:
        function = kernel.function
        work = work_of(function, shape) if function else None
        if function is None or work is None:
            continue
        least_s = (
            max(work.flops / gpu.flops_per_s["tf32" if "Tf32" in function else "bf16"],
                work.bytes / gpu.bytes_per_s)
            for gpu in gpus
        )  # fmt: skip
        numbers = [f"{work.flops / 1e9:.3f}", f"{work.bytes / 1e6:.2f}", *(f"{s * 1e6:.2f}" for s in least_s)]
        rows.append((kernel.name, *numbers, function))
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
    """Show the machine code of a model compiled for an NVIDIA GPU, and the work of its kernels, one line each.

    HMMA multiplies matrices on tensor cores, LDGSTS copies asynchronously to shared memory, LDSM loads matrix fragments
    from there; spills are accesses to local memory. Occupancy is the share of a multiprocessor's threads that fit at a
    time. The second table has the FLOPs and bytes of one launch, and the least time that GPUs of that arch need for it.

    Args:
        model: a folder written by python -m tvm_frontend.compile --target cuda
        batch: sequences, for the second table
        tokens: new tokens of each sequence
        context: tokens of each sequence that are already in the cache
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
    """Resolve the shape of the command line for a model. Raises UserError for a shape that the model does not take."""
    block_size, cached = compiled.gpt.block_size, compiled.form == "cached"
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
    """Parse the command line and show the tables."""
    tyro.cli(inspect_command, prog="python -m tvm_frontend.inspect")
