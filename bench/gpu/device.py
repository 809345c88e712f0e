"""Describes the device that is measured, and probes its peak rates."""

from dataclasses import dataclass

from bench.correctness.agreement import PRECISIONS
from bench.gpu.clock import sample_on
from bench.harness.machine import describe_machine
from bench.harness.worker import Worker
from bench.models.artifacts import Artifacts
from bench.models.shape import Model
from bench.roofline.bounds import Roofline, weight_bytes
from gpt.cli import UserError
from tvm_frontend.cuda_toolchain import gpu_arch

DEVICES = ("cuda", "cpu")  # on a CPU the command can be tried without a GPU
COPIED_BYTES = {"cuda": 4 << 30, "cpu": 64 << 20}  # copied by the bandwidth probe, more than caches hold
LARGEST_SHARE = 4  # at most one part in so many of the free memory is copied
WIDTH = {"cuda": 8192, "cpu": 512}  # of the square matrices whose product shows the peak
PROBE_S = {"cuda": 1.0, "cpu": 0.02}  # seconds of calls per probe
FACTORY = f"{__name__}:Probe"


@dataclass(frozen=True)
class DeviceArtifacts(Artifacts):
    """The files of a model, for engines on one device. target: the GPU arch to compile for, as `sm_90`, or `llvm`."""

    device: str = "cuda"
    target: str = "sm_86"

    @property
    def name(self) -> str:
        """Return the model's name: `gpt2` of the folder `seeded-gpt2`."""
        return self.folder.name.removeprefix("seeded-")


def target_of(device: str) -> str:
    """Name the target to compile for on this machine: the GPU's arch, or `llvm` for the CPU.

    Raises UserError for a name that is not in DEVICES, and without a GPU that both NVIDIA's driver and torch see.
    """
    if device not in DEVICES:
        raise UserError(f"device {device!r}: must be one of {', '.join(DEVICES)}")
    if device == "cpu":
        return "llvm"
    import torch

    arch = gpu_arch()
    if arch is None:
        raise UserError("no NVIDIA driver with a GPU on this machine: run it where there is one, or try --device cpu")
    if not torch.cuda.is_available():
        raise UserError(
            f"there is a GPU ({arch}), but torch {torch.__version__} does not see it: install a torch built for CUDA"
        )
    return arch


class Probe:
    """Measures a device by torch, in a worker. The best call counts, as a peak rate is not an average."""

    def load(self, device: str) -> None:
        """Prepare for a device in DEVICES."""
        self._device = device

    def describe(self) -> dict[str, str | int | None]:
        """Describe the device for readers; a CPU as `bench.harness.machine` does."""
        import torch

        here = describe_machine()
        if self._device == "cpu":
            return {"name": here["cpu"], "memory_bytes": here["memory_bytes"], "host": here["cpu"]}
        found = torch.cuda.get_device_properties(0)
        return {
            "name": found.name,
            "arch": f"sm_{found.major}{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "memory_bytes": found.total_memory,
            "l2_bytes": found.L2_cache_size,
            "cuda": torch.version.cuda,
            "host": here["cpu"],
        }

    def copied_bytes_per_s(self) -> float:
        """Measure the bandwidth of a large copy within the device's memory: bytes read and written per second."""
        import torch

        size = COPIED_BYTES[self._device]
        if self._device == "cuda":
            size = min(size, torch.cuda.mem_get_info()[0] // LARGEST_SHARE)
        source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=self._device)
        target = torch.empty_like(source)
        seconds = min(sample_on(self._device, lambda: target.copy_(source), PROBE_S[self._device]))
        return 2 * size / seconds

    def peak_flops_per_s(self, precision: str) -> float:
        """Measure the rate of a large random product, two operations per multiply-add; float32 without tf32."""
        import torch

        torch.set_float32_matmul_precision("highest")
        n = WIDTH[self._device]
        a, b = (
            torch.randn(n, n, device=self._device).to(getattr(torch, PRECISIONS[precision].dtype)) for _ in range(2)
        )
        out = torch.empty_like(a)
        seconds = min(sample_on(self._device, lambda: torch.mm(a, b, out=out), PROBE_S[self._device]))
        return 2 * n**3 / seconds


def measure_limits(probe: Worker, precisions: list[str], config: Model, threads: int) -> dict[str, Roofline]:
    """Measure the limits of each precision for one model. probe: a worker of a loaded `Probe`. Raises WorkerError."""
    bandwidth = probe.call("copied_bytes_per_s")
    return {
        precision: Roofline(
            threads,
            probe.call("peak_flops_per_s", precision),
            bandwidth,
            weight_bytes(config, precision),
            bandwidth,
            precision,
        )
        for precision in precisions
    }
