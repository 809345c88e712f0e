"""python -m gpt.generate artifacts/ckpt.pt --prompt "def " --tokens 200 --temperature 0.8 --top-k 40 --seed 1

Continue a text with a trained model, one character after the other as they are drawn.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from gpt.checkpoint import load_checkpoint
from gpt.cli import UserError, run_command
from gpt.model import GPT
from gpt.tokenizer import check_ids, tokenizer_from_json


def generate(
    model: GPT,
    ids: Sequence[int],
    tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int | None = None,
) -> Iterator[int]:
    """Yield `tokens` ids that continue `ids`, of which the model sees the last block_size.

    temperature: 0 takes the likeliest each time. top_k: draw among so many likeliest only. seed: None draws anew each
    time.
    Raises UserError, before anything is computed, for ids or settings out of range.
    """
    check_ids(ids, model.config)
    if tokens < 0:
        raise UserError(f"tokens={tokens}: must be at least 0")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature={temperature}: must be at least 0")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k={top_k}: must be at least 1")
    if seed is not None and not 0 <= seed < 2**63:
        raise UserError(f"seed={seed}: must be at least 0 and below 2**63")
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return _continue(model, list(ids), tokens, temperature, top_k, generator)


def _continue(
    model: GPT, ids: list[int], tokens: int, temperature: float, top_k: int | None, generator: torch.Generator
) -> Iterator[int]:
    device = next(model.parameters()).device
    for _ in range(tokens):
        with torch.inference_mode():
            seen = torch.tensor([ids[-model.config.block_size :]], device=device)  # [1, T]
            logits = model(seen, last_only=True)[0, 0].float().cpu()  # [V]
            ids.append(_draw(logits, temperature, top_k, generator))
        yield ids[-1]


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """One id by logits [V]."""
    if temperature == 0:
        return int(logits.argmax())
    values, indices = logits.topk(min(top_k or len(logits), len(logits)))  # [k] each
    chances = torch.softmax((values - values[0]) / temperature, dim=0)  # less the largest first: no overflow
    return int(indices[torch.multinomial(chances, 1, generator=generator)])


def run(
    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CKPT")] = Path("artifacts/ckpt.pt"),
    prompt: Annotated[str, tyro.conf.arg(help_behavior_hint="(default: a new line)")] = "\n",
    tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int | None = None,
) -> None:
    """Continue a text with a trained model, one character after the other as they are drawn.

    Args:
        checkpoint: what python -m gpt.train wrote
        prompt: the text to continue
        tokens: how many to add
        temperature: below 1 is safer, above 1 wilder; 0 takes the likeliest each time
        top_k: draw among so many likeliest only
        seed: the same seed draws the same text; without one it differs each time
    """
    found = load_checkpoint(checkpoint)
    tokenizer = tokenizer_from_json(found.tokenizer)
    added = generate(
        found.build("sdpa"), tokenizer.encode(prompt), tokens, temperature=temperature, top_k=top_k, seed=seed
    )
    print(prompt, end="", flush=True)
    for index in added:
        print(tokenizer.decode([index]), end="", flush=True)
    print()


def main() -> None:
    """Parse the command line and generate."""
    tyro.cli(run, prog="python -m gpt.generate")


if __name__ == "__main__":
    run_command(main)
