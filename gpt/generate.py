"""python -m gpt.generate artifacts/ckpt.pt --prompt "def " --tokens 200 --temperature 0.8 --top-k 40 --seed 1
python -m gpt.generate artifacts/ckpt.pt --prompt-file start.txt --samples 3 --top-p 0.95

Continue a text with a trained model, one token after the other as they are drawn.
"""

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is one line too
    from gpt.cli import run_main

    run_main("gpt.generate", prints=True)

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from gpt.bigram import Bigram
from gpt.cache import KVCache
from gpt.checkpoint import load_checkpoint
from gpt.cli import UserError
from gpt.device import check_memory, explain_memory, find_device
from gpt.files import find_input
from gpt.model import GPT
from gpt.tokenizer import Tokenizer, check_ids, check_unicode, tokenizer_from_json

BETWEEN_SAMPLES = "-" * 15


@dataclass(frozen=True)
class Sampling:
    """Draws the next token. Raises UserError that names the field, its value and what is allowed.

    temperature: 0 takes the likeliest each time. top_k: draw among so many likeliest only. top_p: draw among the fewest
    likeliest that together have this probability (https://arxiv.org/abs/1904.09751), after top_k. seed: None draws
    anew each time.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature={self.temperature}: must be at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k={self.top_k}: must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: must be above 0 and at most 1")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise UserError("temperature=0: takes the likeliest, so top_k and top_p change nothing; leave them out")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UserError(f"seed={self.seed}: must be at least 0 and below 2**63")

    def generator(self) -> torch.Generator:
        """Return a source of chance at its beginning."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator

    def draw(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Return one id for each row of logits [B, V], on the CPU: int64 [B]."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        V = logits.shape[-1]
        values, ids = logits.topk(min(self.top_k or V, V))  # [B, k] each, the likeliest first
        chances = torch.softmax((values - values[:, :1]) / self.temperature, dim=-1)  # less the largest: no overflow
        if self.top_p is not None:
            before = chances.cumsum(dim=-1) - chances  # [B, k]: of all that are likelier
            chances = chances.where((before < self.top_p) | (before == 0), 0)  # the likeliest stays in any case
        return ids.gather(1, torch.multinomial(chances, 1, generator=generator)).flatten()


def generate(
    model: GPT | Bigram,
    ids: Sequence[int],
    tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    cache: bool = True,
) -> Iterator[int]:
    """Yield `tokens` ids that continue `ids`, of which the model sees the last block_size.

    The settings are those of `Sampling`. Raises UserError, before anything is computed, for ids or settings out of
    range.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    return (drawn for (drawn,) in generate_samples(model, ids, tokens, 1, sampling, cache=cache))


def generate_samples(
    model: GPT | Bigram, ids: Sequence[int], tokens: int, samples: int, sampling: Sampling, *, cache: bool = True
) -> Iterator[list[int]]:
    """Continue `ids` in several ways at once: yield, `tokens` times, the next id of each of the `samples`.

    cache: keep keys and values in a `KVCache` as long as the text fits in block_size; it changes the time, not the
    meaning. Beyond that each token has another position than before, so all are computed anew. Raises UserError, before
    anything is computed, for ids or settings out of range and for more samples than this machine's memory holds.
    """
    check_ids(ids, model.config.vocab_size)
    if tokens < 0:
        raise UserError(f"tokens={tokens}: must be at least 0")
    if not 1 <= samples < 2**31:
        raise UserError(f"samples={samples}: must be at least 1 and below 2**31")
    config = model.config
    if next(model.parameters()).device.type == "cpu":
        kept = 2 * config.n_layer * config.block_size * config.n_embd if cache else 0
        check_memory(4 * samples * (kept + config.vocab_size), "keys, values and logits", "lower --samples")
    return _continue(model, list(ids), tokens, samples, sampling, cache)


def _continue(
    model: GPT | Bigram, ids: list[int], tokens: int, samples: int, sampling: Sampling, cache: bool
) -> Iterator[list[int]]:
    weight, block_size = next(model.parameters()), model.config.block_size
    device = weight.device
    seen = torch.tensor([ids], device=device).expand(samples, -1)  # [B, T]
    generator = sampling.generator()
    with torch.inference_mode():
        kept = KVCache(model.config, samples, device, weight.dtype) if cache else None
    for _ in range(tokens):
        with torch.inference_mode():
            if kept is not None and seen.shape[1] <= block_size:
                logits = model(seen[:, kept.length :], last_only=True, cache=kept)  # [B, 1, V]
            else:
                logits = model(seen[:, -block_size:], last_only=True)  # [B, 1, V]
            drawn = sampling.draw(logits[:, 0].float().cpu(), generator)  # [B]
            seen = torch.cat([seen, drawn.to(device)[:, None]], dim=1)  # [B, T + 1]
        yield drawn.tolist()


def run(
    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CKPT")] = Path("artifacts/ckpt.pt"),
    prompt: Annotated[str | None, tyro.conf.arg(help_behavior_hint="(default: a new line)")] = None,
    prompt_file: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    tokens: int = 200,
    samples: int = 1,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    cache: bool = True,
    device: str = "auto",
) -> None:
    """Continue a text with a trained model, one token after the other as they are drawn.

    Args:
        checkpoint: what python -m gpt.train wrote, or a GPT-2 that others saved
        prompt: the text to continue
        prompt_file: a file with the text to continue
        tokens: how many to add
        samples: how many continuations; the first is shown as it is drawn, the others after it
        temperature: below 1 is safer, above 1 wilder; 0 takes the likeliest each time
        top_k: draw among so many likeliest only
        top_p: draw among the fewest likeliest that together have this probability
        seed: the same seed draws the same text; without one it differs each time
        cache: keep what was computed of earlier tokens; without it the same text comes more slowly
        device: auto (the first of cuda, mps, cpu that is here), or one of them
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    where = find_device(device)
    text = _prompt_of(prompt, prompt_file)
    check_unicode(text, "--prompt")  # a command line's bytes that are not UTF-8 come as halves of surrogate pairs
    found = load_checkpoint(find_input(checkpoint))
    tokenizer = tokenizer_from_json(found.tokenizer)
    model = found.build("sdpa").to(where)
    steps = generate_samples(model, tokenizer.encode(text), tokens, samples, sampling, cache=cache)
    with explain_memory("lower --samples"):
        first = next(steps, None)  # before anything is printed, and what takes the most memory
    print(text, end="", flush=True)
    others = _stream_first(itertools.chain([] if first is None else [first], steps), tokenizer)
    for ids in others:
        print(f"{BETWEEN_SAMPLES}\n{text}{tokenizer.decode(ids)}")


def _stream_first(steps: Iterator[list[int]], tokenizer: Tokenizer) -> list[list[int]]:
    """Print the first sample while it is drawn; the ids of the others."""
    others = []

    def first_ones() -> Iterator[int]:
        for first, *rest in steps:
            others.append(rest)
            yield first

    for piece in tokenizer.pieces(first_ones()):
        print(piece, end="", flush=True)
    print()
    return [list(ids) for ids in zip(*others, strict=True)]


def _prompt_of(prompt: str | None, file: Path | None) -> str:
    if file is None:
        return "\n" if prompt is None else prompt
    if prompt is not None:
        raise UserError("--prompt and --prompt-file are two prompts; give one of them")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt-file {file}: cannot be read as UTF-8 text ({error}); give a text file") from error


def main() -> None:
    """Parse the command line and generate."""
    tyro.cli(run, prog="python -m gpt.generate")
