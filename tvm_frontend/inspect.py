"""What the machine did get: the kernels of a compiled CUDA library, read from their machine code.

python -m tvm_frontend.inspect artifacts/tvm-sm_86-O3       # on any machine; none needs a GPU
"""

import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gpt.cli import UserError, run_command
from tvm_frontend.artifact import LIBRARY, RELAY, load_compiled
from tvm_frontend.cuda_toolchain import cubins, find_tool

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
MATRIX, COPY, LOAD = "HMMA", "LDGSTS", "LDSM"  # mma.sync, cp.async, ldmatrix
SPILLS = ("LDL", "STL")  # loads and stores of local memory


@dataclass(frozen=True)
class KernelCode:
    """One kernel of a cubin. registers: a thread's. threads, shared_bytes: a block's. instructions: by their opcode."""

    name: str
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


def read_kernels(library: Path, launches: dict[str, dict[str, int]]) -> list[KernelCode]:
    """Every kernel in a library, in the order of its machine code.

    launches: the threads and the bytes of shared memory of a block of each, which are not in the code. Raises UserError
    without NVIDIA's tools to read it.
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
                found.append(
                    KernelCode(
                        name.strip(), arch, registers[name.strip()], launch["threads"], launch["shared_bytes"],
                        Counter(opcodes),
                    )
                )  # fmt: skip
    return found


def table(kernels: list[KernelCode]) -> str:
    """The kernels in columns, for people."""
    head = ("kernel", "instructions", MATRIX, COPY, LOAD, "spills", "registers", "threads", "shared KB", "occupancy")
    rows = [
        (
            kernel.name, str(sum(kernel.instructions.values())), *(str(kernel.count(n)) for n in (MATRIX, COPY, LOAD)),
            str(kernel.spills), str(kernel.registers), str(kernel.threads), f"{kernel.shared_bytes / 1024:.1f}",
            "–" if kernel.occupancy is None else f"{kernel.occupancy:.0%}",
        )
        for kernel in kernels
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = ("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in (head, *rows))
    return "\n".join(line.rstrip() for line in lines)


def inspect_command(model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]) -> None:
    """Show the machine code of a model compiled for an NVIDIA GPU: a line a kernel.

    HMMA multiplies matrices, LDGSTS copies to shared memory behind the work, LDSM reads matrices from there; spills go
    to memory what the registers do not hold. Occupancy is the share of a multiprocessor's threads that fit at a time.

    Args:
        model: a folder written by python -m tvm_frontend.compile --target cuda
    """
    compiled = load_compiled(model)
    if compiled.target["kind"] != "cuda":
        raise UserError(f"{model}: compiled for {compiled.target['kind']}; this command reads the code of GPUs")
    if compiled.frontend == RELAY:
        raise UserError(f"{model}: compiled by Relay, which does not tell how its kernels are launched")
    print(table(read_kernels(compiled.path / LIBRARY, compiled.launches)))


def main() -> None:
    """Parse the command line and show."""
    tyro.cli(inspect_command, prog="python -m tvm_frontend.inspect")


if __name__ == "__main__":
    run_command(main)
