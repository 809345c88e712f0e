"""The one table of NVIDIA's GPUs: what a compute capability allows, and what each product can do at best.

It lies in `gpt` because that package may import nothing else of the project, and all the others may import it. CPUs are
not here: their rates and bandwidths are measured where they are needed (`bench/roofline/probe.py`).

Sources: the CUDA C++ Programming Guide, table "Technical specifications per compute capability", for the limits of a
multiprocessor; for products, NVIDIA's data sheets (V100, A100 80 GB SXM, A40, L40S, H100 SXM and PCIe, H200 SXM) and
its whitepapers of the architectures GA102 (RTX 3090), Ada (RTX 4090) and RTX Blackwell (RTX 5090).
"""

from collections.abc import Mapping
from dataclasses import dataclass

WARP_LANES = 32
# Every compute capability since 7.5 allows a block this much without opting in to more (CUDA programming guide).
BLOCK_THREADS, BLOCK_SHARED_BYTES = 1024, 48 << 10
BLOCK_RESERVED_SHARED_BYTES = 1 << 10  # of shared memory that CUDA adds to what each block asks for
REGISTERS_UNIT = 256  # A warp's registers are allocated in multiples of this many.


@dataclass(frozen=True)
class Multiprocessor:
    """The most that one streaming multiprocessor holds at a time: threads, 32-bit registers, shared memory, blocks."""

    threads: int
    registers: int
    shared_bytes: int
    blocks: int


@dataclass(frozen=True)
class Arch:
    """One compute capability.

    multiprocessors: of the largest product, None where none is known. limits: of one multiprocessor, None where
    this project has not taken them from the programming guide.
    """

    multiprocessors: int | None
    limits: Multiprocessor | None = None


# The archs that nvcc 13.0 lists with --list-gpu-code; CUDA 13 dropped sm_50 to sm_72. Beside each stands its largest
# product. The number of multiprocessors is that of CUDA cores in the product's data sheet, divided by the cores of one
# multiprocessor (64 in sm_75 and sm_80, 128 later); for B200 it is what the driver reports.
ARCHS: Mapping[str, Arch] = {
    "sm_75": Arch(72, Multiprocessor(1024, 65536, 64 << 10, 16)),  # Quadro RTX 8000
    "sm_80": Arch(108, Multiprocessor(2048, 65536, 164 << 10, 32)),  # A100
    "sm_86": Arch(84, Multiprocessor(1536, 65536, 100 << 10, 16)),  # A40, a full GA102
    "sm_87": Arch(16, Multiprocessor(1536, 65536, 164 << 10, 16)),  # Jetson AGX Orin 64 GB
    "sm_88": Arch(None),
    "sm_89": Arch(142, Multiprocessor(1536, 65536, 100 << 10, 24)),  # L40S
    "sm_90": Arch(132, Multiprocessor(2048, 65536, 228 << 10, 32)),  # H100 SXM, H200
    "sm_100": Arch(148, Multiprocessor(2048, 65536, 228 << 10, 32)),  # B200
    "sm_103": Arch(None),
    "sm_110": Arch(20),  # Jetson AGX Thor
    "sm_120": Arch(188, Multiprocessor(1536, 65536, 100 << 10, 24)),  # RTX PRO 6000 Blackwell
    "sm_121": Arch(48),  # GB10 of DGX Spark
}
DEFAULT_ARCH = "sm_86"


@dataclass(frozen=True)
class Gpu:
    """One product, with the figures that its maker states.

    bytes_per_s: bandwidth of its memory. flops_per_s: by precision, of dense matrices (no sparsity) with sums in
    float32; on tensor cores but for fp32. driver_name: a part of the name that the driver reports, None where other
    products have that part in their names too, as RTX A4000 has A40, and laptops' GPUs have RTX 4090.
    """

    name: str
    arch: str
    multiprocessors: int
    bytes_per_s: float
    flops_per_s: Mapping[str, float]
    driver_name: str | None = None


def _rates(fp32: float, tf32: float | None, bf16: float | None, fp16: float) -> dict[str, float]:
    """FLOP/s by precision, given in TFLOP/s; None for what the product has no instruction for."""
    given = {"fp32": fp32, "tf32": tf32, "bf16": bf16, "fp16": fp16}
    return {precision: tera * 1e12 for precision, tera in given.items() if tera is not None}


# Where one driver_name is a part of another, the longer stands first: `gpu_named` takes the first that fits.
GPUS = (
    Gpu("V100", "sm_70", 80, 900e9, _rates(15.7, None, None, 125), "V100"),
    Gpu("A100", "sm_80", 108, 2039e9, _rates(19.5, 156, 312, 312), "A100"),
    Gpu("RTX 3090", "sm_86", 82, 936e9, _rates(35.6, 35.6, 71, 71)),
    Gpu("A40", "sm_86", 84, 696e9, _rates(37.4, 74.8, 149.7, 149.7)),
    Gpu("RTX 4090", "sm_89", 128, 1008e9, _rates(82.6, 82.6, 165.2, 165.2)),
    Gpu("L40S", "sm_89", 142, 864e9, _rates(91.6, 183, 362, 362)),
    Gpu("H100 PCIe", "sm_90", 114, 2000e9, _rates(51, 378, 756, 756), "H100 PCIe"),
    Gpu("H100", "sm_90", 132, 3350e9, _rates(67, 494.7, 989.4, 989.4), "H100"),
    Gpu("H200", "sm_90", 132, 4800e9, _rates(67, 494.7, 989.4, 989.4), "H200"),
    Gpu("RTX 5090", "sm_120", 170, 1792e9, _rates(104.8, 104.8, 209.5, 209.5)),
)


def gpu_named(name: str) -> Gpu | None:
    """The product that the driver calls `name`, as `NVIDIA A100-SXM4-80GB`; None if it is not in the table."""
    return next((gpu for gpu in GPUS if gpu.driver_name and gpu.driver_name in name), None)


def multiprocessors_of(arch: str) -> int:
    """Multiprocessors of the largest product of an arch; where none is known, of DEFAULT_ARCH."""
    known = (ARCHS[each].multiprocessors for each in (arch, DEFAULT_ARCH))
    return next(count for count in known if count is not None)
