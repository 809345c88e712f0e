"""What a device can do at best, for saying which part of it a training step uses."""

import time

import torch

# NVIDIA's data sheets, dense, in FLOP/s. A name is looked for in what the device calls itself, the first match wins
DATA_SHEETS = (
    ("H200", {"fp32": 67e12, "tf32": 494.7e12, "bf16": 989.4e12, "fp16": 989.4e12}),
    ("H100 PCIe", {"fp32": 51e12, "tf32": 378e12, "bf16": 756e12, "fp16": 756e12}),
    ("H100", {"fp32": 67e12, "tf32": 494.7e12, "bf16": 989.4e12, "fp16": 989.4e12}),
    ("A100", {"fp32": 19.5e12, "tf32": 156e12, "bf16": 312e12, "fp16": 312e12}),
    ("V100", {"fp32": 15.7e12, "fp16": 125e12}),
)
MEASURED_S = 0.1  # how long others are measured
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def peak_flops(device: torch.device, precision: str) -> tuple[float, str]:
    """FLOP/s at that precision, and where the number is from: a data sheet, or for others a measurement made now."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, sheet in DATA_SHEETS:
            if part in name and precision in sheet:
                return sheet[precision], f"{name}'s data sheet"
    return _measured(device, precision), "the best of some matrix products, measured"


def _measured(device: torch.device, precision: str) -> float:
    n = 1024 if device.type == "cpu" else 8192  # well above where a product stops getting faster
    a = torch.ones(n, n, device=device, dtype=DTYPES.get(precision, torch.float32))
    taken_s: list[float] = []
    while len(taken_s) < 2 or sum(taken_s) < MEASURED_S:  # the first also warms up
        started_s = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        taken_s.append(time.perf_counter() - started_s)
    return 2 * n**3 / min(taken_s)
