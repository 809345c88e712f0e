"""The peak rate of a device, so that a training step can be given as a share of it (model FLOPs utilisation)."""

import time

import torch

from gpt.hardware import gpu_named

MEASURED_S = 0.1  # spent measuring a device that is not in the table
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def peak_flops(device: torch.device, precision: str) -> tuple[float, str]:
    """Return FLOP/s at a precision and where the figure is from: a data sheet, or else a measurement made now."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        gpu = gpu_named(name)
        if gpu is not None and precision in gpu.flops_per_s:
            return gpu.flops_per_s[precision], f"{name}'s data sheet"
    return _measured(device, precision), "the best of some matrix products, measured"


def _measured(device: torch.device, precision: str) -> float:
    n = 1024 if device.type == "cpu" else 8192  # well beyond the size from which a product gets no faster
    a = torch.ones(n, n, device=device, dtype=DTYPES.get(precision, torch.float32))
    taken_s: list[float] = []
    while len(taken_s) < 2 or sum(taken_s) < MEASURED_S:  # the first also warms up
        started_s = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        taken_s.append(time.perf_counter() - started_s)
    return 2 * n**3 / min(taken_s)
