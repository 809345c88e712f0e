"""Move the weights: AdamW, its rate over the steps, and the precision that it is fed with."""

import math
from contextlib import AbstractContextManager

import torch
from torch import nn

from gpt.cli import UserError
from gpt.train_config import TrainConfig


def optimizer_of(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return AdamW (https://arxiv.org/abs/1711.05101) whose decay spares gains and biases, in one kernel an update."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]  # a bigram has no gains
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, config.beta2), fused=True)


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Return a rate that rises from 0 in the warm-up, then falls by half a cosine to min_lr (https://arxiv.org/abs/1608.03983)."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    last = config.decay_steps or config.max_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, last - config.warmup_steps))
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (config.learning_rate - config.min_lr)


def precision_of(config: TrainConfig, device: torch.device) -> str:
    """Return the precision that `auto` means here: bf16 on a GPU that has it, else fp32. Raises UserError if absent."""
    if config.precision == "tf32" and device.type != "cuda":
        raise UserError(f"--precision tf32: needs a CUDA GPU, and this runs on {device.type}; use fp32 or bf16")
    if config.precision != "auto":
        return config.precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """Return the context in which the model runs forward."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def allow_tf32(precision: str, device: torch.device) -> None:
    """Let a GPU's float32 products round to TF32, for all but fp32; torch keeps this for the whole process."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
