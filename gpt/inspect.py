"""python -m gpt.inspect artifacts/ckpt.pt
python -m gpt.inspect artifacts/ckpt.pt --batch-size 12

Show what is in a checkpoint and what it costs: parameters, FLOPs per token, memory per phase. Nothing is measured.
"""

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is one line too
    from gpt.cli import run_main

    run_main("gpt.inspect", prints=True)

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tabulate import tabulate

from gpt.checkpoint import Checkpoint, load_checkpoint
from gpt.cli import UserError
from gpt.config import GPTConfig
from gpt.costs import decode_flops_per_token, prefill_flops_per_token, training_flops_per_token
from gpt.files import find_input
from gpt.memory import PHASES, phase_memory


@dataclass(frozen=True)
class Parameters:
    """One row of the table: tensors of one name, whatever their layer, and one shape. total: numbers in all of them."""

    name: str
    shape: tuple[int, ...]
    tensors: int
    total: int


def parameter_table(checkpoint: Checkpoint) -> list[Parameters]:
    """List the parameters in the model's order, each learned number in one row only: a tied head has no row."""
    rows: dict[str, Parameters] = {}
    for name, parameter in checkpoint.build().named_parameters():
        name = re.sub(r"\.h\.\d+\.", ".h.*.", name)
        tensors = rows[name].tensors + 1 if name in rows else 1
        rows[name] = Parameters(name, tuple(parameter.shape), tensors, tensors * parameter.numel())
    return list(rows.values())


def describe(checkpoint: Checkpoint, batch_size: int = 1) -> Iterator[str]:
    """Yield the lines of the whole report. Raises UserError for a batch size out of range."""
    if not 1 <= batch_size < 2**31:
        raise UserError(f"batch_size={batch_size}: must be at least 1 and below 2**31")
    yield from (_words(checkpoint), "", *_parameter_lines(checkpoint), "")
    yield from (*_flops_lines(checkpoint.config), "", *_memory_lines(checkpoint.config, batch_size))


def _words(checkpoint: Checkpoint) -> str:
    config = checkpoint.config
    words = [f"{config.model}", f"vocabulary {config.vocab_size}", f"block_size {config.block_size}"]
    if config.model == "gpt":
        words += [f"{config.n_layer} layers", f"{config.n_head} heads", f"width {config.n_embd}", config.activation]
        words += ["biases" if config.bias else "no biases", "tied head" if config.tied_head else "head of its own"]
        words += [f"{name} {value}" for name, value in _unusual(config)]
    return ", ".join([*words, f"step {checkpoint.step}", f"tokenizer {checkpoint.tokenizer['kind']}"])


def _unusual(config: GPTConfig) -> Iterator[tuple[str, Any]]:
    """Yield the fields in which few GPT-2s differ from the published ones, where this one does."""
    for name in ("n_inner", "layer_norm_epsilon", "scale_attn_weights", "scale_attn_by_inverse_layer_idx"):
        if (value := getattr(config, name)) != getattr(GPTConfig(), name):
            yield name, value


def _parameter_lines(checkpoint: Checkpoint) -> Iterator[str]:
    rows = parameter_table(checkpoint)
    lines = [(row.name, str(list(row.shape)), str(row.tensors), f"{row.total:,}") for row in rows]
    lines.append(("total", "", str(sum(row.tensors for row in rows)), f"{sum(row.total for row in rows):,}"))
    yield from _table(lines, "parameter", "shape", "tensors", "numbers")


def _flops_lines(config: GPTConfig) -> Iterator[str]:
    T = config.block_size
    yield f"FLOPs per token at T = {T}; N: weights of matrix products, L: layers, C: width"
    for phase, flops, formula in (
        ("prefill", prefill_flops_per_token(config, T), "2·N + 2·L·C·(T + 1), causal: arXiv 2001.08361, table 1"),
        ("decode", decode_flops_per_token(config, T), "2·N + 4·L·C·T, the T-th token with a KV cache"),
        ("training", training_flops_per_token(config, T), "6·N + 12·L·C·T, as for MFU: arXiv 2204.02311, appendix B"),
    ):
        yield f"  {phase:9} {flops:>18,.0f}   {formula}"


def _memory_lines(config: GPTConfig, B: int) -> Iterator[str]:
    yield f"MB per phase, float32 with sdpa on a CPU, B = {B}, T = {config.block_size} (MB: 10⁶ bytes)"
    heads = ("weights", "gradients", "AdamW", "KV cache", "activations", "total")
    lines = []
    for phase in PHASES:
        found = phase_memory(config, phase, B, config.block_size)
        parts = (found.weights_bytes, found.gradients_bytes, found.optimizer_bytes, found.cache_bytes)
        columns = (*parts, found.activations_bytes, found.total_bytes)
        lines.append((phase, *(f"{size / 1e6:,.2f}" for size in columns)))
    for line in _table(lines, "", *heads):
        yield f"  {line}"


def _table(rows: Sequence[tuple[str, ...]], *heads: str) -> list[str]:
    """Align names to the left and numbers to the right."""
    alignment = ("left", *["right"] * (len(heads) - 1))
    return tabulate(rows, heads, "plain", colalign=alignment, disable_numparse=True).splitlines()


def run(
    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CKPT")] = Path("artifacts/ckpt.pt"),
    batch_size: int = 1,
) -> None:
    """Show what is in a checkpoint and what it costs: parameters, FLOPs per token, memory per phase.

    Args:
        checkpoint: what python -m gpt.train wrote, or a GPT-2 that others saved
        batch_size: sequences at once, for the memory
    """
    for line in describe(load_checkpoint(find_input(checkpoint)), batch_size):
        print(line)


def main() -> None:
    """Parse the command line and show."""
    tyro.cli(run, prog="python -m gpt.inspect")
