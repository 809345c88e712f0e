"""Compares training with two references: nanoGPT's published loss of its CPU recipe, and a plain loop's speed."""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import tyro
from torch import nn

from gpt.cli import UserError, check_threads
from gpt.corpus import load_corpus
from gpt.distributed import Ranks
from gpt.presets import PRESETS
from gpt.progress import progress_bar
from gpt.run import Run
from gpt.train import train, update

PUBLISHED = 1.88  # nanoGPT's README, best validation loss on tinyshakespeare
BAR = 1.90


def recipe(
    corpus: Path,
    seeds: tuple[int, ...] = (1, 2, 3),
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("artifacts/recipe"),
    threads: int | None = None,
) -> None:
    """Train nanoGPT's CPU recipe once per seed and print the median of the best validation losses.

    Args:
        corpus: a text file; the published loss is of tinyshakespeare
        seeds: one run each, minutes on two cores; an interrupted run is resumed, a finished one is only read
        output: a folder for the runs
        threads: CPU threads; torch's default if not given
    """
    losses = []
    for seed in seeds:
        config = replace(
            PRESETS["char-cpu"][1],
            corpus=corpus,
            seed=seed,
            output=output / f"seed-{seed}.pt",
            resume=True,
            threads=threads,
        )
        found = train(config)
        losses.append(min(found.losses["val"]))
        print(f"seed {seed}: best validation loss {losses[-1]:.4f} at step {found.step}", flush=True)
    median = statistics.median(losses)
    print(f"median of {len(losses)}: {median:.4f} (nanoGPT publishes {PUBLISHED}; the bar is {BAR:.2f})")


def throughput(
    rounds: int = 30,
    steps: int = 10,
    corpus: Path | None = None,
    threads: int | None = None,
) -> None:
    """Time gpt.train's update and a plain loop on the same shapes, in turns, and print both and their ratio.

    Args:
        rounds: the number of turns that each of the two takes
        steps: updates per turn
        corpus: a text file; by default Python's standard library
        threads: CPU threads; torch's default if not given
    """
    if rounds < 2 or steps < 1:
        raise UserError(f"rounds={rounds}, steps={steps}: must be at least 2 and 1, as quartiles are printed")
    check_threads(threads)
    if threads:
        torch.set_num_threads(threads)
    config = replace(PRESETS["char-cpu"][1], corpus=corpus, max_steps=10**6)
    loaded = load_corpus(config.corpus)
    run = Run(config, loaded, Ranks(0, 1, torch.device("cpu")))
    candidates = {"gpt.train": lambda: update(run), "plain": _plain_loop(run)}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for number in progress_bar(range(rounds + 2), desc="throughput", unit="round"):
        for name in sorted(candidates, reverse=number % 2 == 1):  # the first of the two alternates
            started_s = time.perf_counter()
            for _ in range(steps):
                candidates[name]()
            if number >= 2:  # two rounds warm up
                samples[name].append((time.perf_counter() - started_s) / steps)
    tokens = config.batch_size * config.block_size
    for name, taken_s in samples.items():
        low, middle, high = statistics.quantiles([tokens / each for each in taken_s], n=4)
        print(f"{name:10s} {middle:8,.0f} tok/s (quartiles {low:,.0f} … {high:,.0f})")
    ratios = [plain / ours for ours, plain in zip(samples["gpt.train"], samples["plain"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"gpt.train is {middle:.3f}× plain, the median of {rounds} rounds (quartiles {low:.3f} … {high:.3f})")


def _plain_loop(run: Run) -> Callable[[], float]:
    """Return one update of a straightforward training loop that uses torch's own modules and functions alone."""
    shape, config = run.raw.config, run.config
    model = _PlainGPT(shape.vocab_size, shape.block_size, shape.n_layer, shape.n_head, shape.n_embd)
    decayed = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(0.9, config.beta2),
        fused=True,
    )
    ids = torch.from_numpy(run.corpus.train.read(0, len(run.corpus.train)))

    def step() -> float:
        starts = torch.randint(len(ids) - config.block_size, (config.batch_size,))
        x = torch.stack([ids[start : start + config.block_size] for start in starts])  # [B, T]
        y = torch.stack([ids[start + 1 : start + 1 + config.block_size] for start in starts])
        logits = model(x)
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


class _PlainBlock(nn.Module):
    """Computes the same as `gpt.model.Block` without biases, in the most direct way."""

    def __init__(self, n_head: int, n_embd: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.ln_1 = nn.LayerNorm(n_embd, bias=False)
        self.attn = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.proj = nn.Linear(n_embd, n_embd, bias=False)
        self.ln_2 = nn.LayerNorm(n_embd, bias=False)
        self.fc = nn.Linear(n_embd, 4 * n_embd, bias=False)
        self.out = nn.Linear(4 * n_embd, n_embd, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, T, C]
        B, T, C = x.shape
        q, k, v = self.attn(self.ln_1(x)).split(C, dim=2)
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in (q, k, v))  # [B, nh, T, hs]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, -1)
        x = x + self.proj(y)
        return x + self.out(F.gelu(self.fc(self.ln_2(x))))


class _PlainGPT(nn.Module):
    """Computes the same as `gpt.model.GPT` without biases, in the most direct way."""

    def __init__(self, vocab_size: int, block_size: int, n_layer: int, n_head: int, n_embd: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        self.blocks = nn.ModuleList(_PlainBlock(n_head, n_embd) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(n_embd, bias=False)
        self.head = nn.Linear(n_embd, vocab_size, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:  # [B, T]
        x = self.wte(ids) + self.wpe(torch.arange(ids.size(1)))  # [B, T, C]
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln_f(x))  # [B, T, V]


def main() -> None:
    """Parse the command line and run one bar."""
    tyro.extras.subcommand_cli_from_dict({"recipe": recipe, "throughput": throughput}, prog="python -m bench.training")
