"""python -m bench.generate --engine onnxruntime --prompt "def " --tokens 40
python -m bench.generate --engine openvino --artifacts my-model

Continue a text greedily with any engine that has a KV cache, and print the tokens as they come.
"""

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is one line too
    from gpt.cli import run_main

    run_main("bench.generate", prints=True)

import importlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from bench.backends import Backend, Candidate, find_candidates
from bench.harness.machine import checked_threads
from bench.harness.work import Generate, phases_of
from bench.models.artifacts import Artifacts
from bench.models.build import choose_artifacts, config_of, prepare
from gpt.checkpoint import load_checkpoint
from gpt.cli import UserError
from gpt.config import GPTConfig
from gpt.tokenizer import Tokenizer, check_ids, tokenizer_from_json

MOST_TOKENS = 200  # default upper limit of the tokens to generate


def run(
    engine: str,
    prompt: str = "\n",
    tokens: int | None = None,
    artifacts: Path = Path("artifacts"),
    threads: int | None = None,
    precision: Literal["fp32", "bf16", "int8", "int4"] = "fp32",
) -> None:
    """Continue a text greedily with any engine that has a KV cache, and print the tokens as they come.

    Args:
        engine: an engine that can generate: eager, sdpa, inductor, onnxruntime, openvino, …
        prompt: the text to continue
        tokens: the number of tokens to add; by default as many as fit in block_size, at most 200
        artifacts: the folder of the model; files that the engine needs are built there if they are absent
        threads: the engine's threads; by default one per physical core that this process may use
        precision: the precision of the matrix products
    """
    threads = checked_threads(threads)
    candidate = _candidate_of(engine, precision)
    found, words = choose_artifacts(artifacts, None)
    config = config_of(found)
    if Generate.phase not in phases_of(config):
        raise UserError(f"{words} has no KV cache to generate with; use python -m gpt.generate {found.checkpoint}")
    prepare(found, [candidate], [Generate.phase])
    tokenizer = tokenizer_from_json(load_checkpoint(found.checkpoint).tokenizer)
    ids = tokenizer.encode(prompt)
    check_ids(ids, config)
    wanted = _room_for(ids, tokens, config)
    loaded = _load(candidate, found, config, threads)
    print(prompt, end="", flush=True)
    seconds = _print_stream(loaded, tokenizer, ids, wanted)
    first_ms, rest_ms = seconds[0] * 1e3, sum(seconds[1:]) * 1e3
    each = f", {rest_ms / len(seconds[1:]):.3g} ms for each of {len(seconds) - 1} more" if seconds[1:] else ""
    print(f"{candidate.label}: {first_ms:.3g} ms to the first token{each}", file=sys.stderr)


def _candidate_of(engine: str, precision: str) -> Candidate:
    """Return the engine's first variant that can generate. Raises UserError if there is none."""
    able = [each for each in find_candidates([engine], [precision]) if Generate.phase in each.phases]
    if not able:
        others = dict.fromkeys(
            each.engine for each in find_candidates((), [precision]) if Generate.phase in each.phases
        )
        raise UserError(f"engine {engine!r} has no KV cache to generate with; those that have: {', '.join(others)}")
    return able[0]


def _room_for(ids: list[int], tokens: int | None, config: GPTConfig) -> int:
    """Return the number of tokens to add to a prompt. Raises UserError unless they fit in block_size after it."""
    room = config.block_size - len(ids) + 1  # the last token is never fed back
    wanted = min(MOST_TOKENS, max(room, 1)) if tokens is None else tokens
    if room < 1 or not 1 <= wanted <= room:
        fits = f"only 1 to {room} fit" if room >= 1 else "none fits"
        raise UserError(
            f"{wanted} tokens after a prompt of {len(ids)}: {fits}, as block_size={config.block_size}; "
            "shorten the prompt, or use python -m gpt.generate, which lets go of the start"
        )
    return wanted


def _load(candidate: Candidate, artifacts: Artifacts, config: GPTConfig, threads: int) -> Backend:
    module, name = candidate.factory.split(":")
    engine: Backend = getattr(importlib.import_module(module), name)()
    engine.load(artifacts, config, threads, candidate.variant)
    return engine


def _print_stream(engine: Backend, tokenizer: Tokenizer, ids: list[int], tokens: int) -> list[float]:
    """Print each token's text as it comes, and return the seconds that each took."""
    seconds: list[float] = []

    def chosen_ids() -> Iterator[int]:
        last_s = time.perf_counter()
        for chosen in engine.stream(np.array([ids]), tokens):
            seconds.append(time.perf_counter() - last_s)
            yield int(chosen[0])  # its text is printed before the next one is timed
            last_s = time.perf_counter()

    for piece in tokenizer.pieces(chosen_ids()):
        print(piece, end="", flush=True)
    print()
    return seconds


def main() -> None:
    """Parse the command line and generate."""
    tyro.cli(run, prog="python -m bench.generate")
