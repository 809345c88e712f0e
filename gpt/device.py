"""Find the device that a model runs on, or take the one that the user names."""

import torch

from gpt.cli import UserError

KINDS = ("cuda", "mps", "cpu")  # in the order in which `auto` looks


def find_device(name: str = "auto") -> torch.device:
    """Return the device of that name (`cuda`, `cuda:1`, `mps`, `cpu`), or for `auto` the first of cuda, mps, cpu here.

    Raises UserError for a name that torch does not know or a device that is not here.
    """
    here = devices_here()
    if name == "auto":
        return torch.device(here[0])
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in KINDS:
        raise UserError(f"--device {name}: must be auto, {', '.join(KINDS)}, or one of several GPUs as cuda:1")
    if device.type not in here:
        raise UserError(f"--device {name}: torch sees none here; it sees {', '.join(here)}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA GPUs here, counted from 0")
    return device


def devices_here() -> list[str]:
    """Return the kinds of device that torch can use here, the fastest first."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [kind for kind in KINDS if found[kind]]
