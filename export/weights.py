"""A checkpoint's model without a second copy of its weights: of GPT-2 XL one is 6 GB."""

import torch

from gpt.bigram import Bigram
from gpt.checkpoint import Checkpoint
from gpt.model import GPT
from gpt.zoo import build_model


def model_of(checkpoint: Checkpoint, attention: str, dtype: torch.dtype = torch.float32) -> GPT | Bigram:
    """Build the model in eval mode, its weights rounded to `dtype`; in float32 they are the checkpoint's own memory."""
    with torch.device("meta"):  # shapes without memory
        model = build_model(checkpoint.config, attention)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in checkpoint.state.items()}, assign=True)
    if isinstance(model, GPT) and checkpoint.config.tied_head:
        model.lm_head.weight = model.transformer.wte.weight
    return model.eval().requires_grad_(False)
