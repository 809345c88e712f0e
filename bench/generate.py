"""python -m bench.generate --engine onnxruntime --prompt "def " --tokens 40
python -m bench.generate --engine openvino --artifacts my-model
python -m bench.generate --engine tvm --onnx theirs.onnx --prompt "def "

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

from bench.backends import Backend, Candidate, find_candidates, refuse_absent
from bench.harness.machine import checked_threads
from bench.harness.work import Generate, phases_of
from bench.models import external
from bench.models.artifacts import Artifacts
from bench.models.build import choose_artifacts, config_of, prepare
from bench.models.shape import Model
from gpt.checkpoint import load_checkpoint
from gpt.cli import UserError
from gpt.foreign.huggingface import TOKENIZER, read_json
from gpt.tokenizer import HuggingFaceTokenizer, NoTokenizer, Tokenizer, gpt2_or_none, tokenizer_from_json

MOST_TOKENS = 200  # default upper limit of the tokens to generate


def run(
    engine: str,
    prompt: str = "\n",
    tokens: int | None = None,
    artifacts: Path = Path("artifacts"),
    threads: int | None = None,
    precision: Literal["fp32", "bf16", "int8", "int4"] = "fp32",
    onnx: Path | None = None,
    prompt_ids: tuple[int, ...] = (),
) -> None:
    """Continue a text greedily with any engine that has a KV cache, and print the tokens as they come.

    Args:
        engine: an engine that can generate: eager, sdpa, inductor, onnxruntime, openvino, …
        prompt: the text to continue
        tokens: the number of tokens to add; by default as many as fit in block_size, at most 200
        artifacts: the folder of the model; files that the engine needs are built there if they are absent
        threads: the engine's threads; by default one per physical core that this process may use
        precision: the precision of the matrix products
        onnx: generate by somebody's ONNX file, as it is, which needs inputs for keys and values of earlier tokens
        prompt_ids: the tokens to continue, in the place of a text; those that come are printed as numbers too
    """
    threads = checked_threads(threads)
    candidate = _candidate_of(engine, precision)
    found, words = choose_artifacts(artifacts, None, onnx)
    config = config_of(found)
    if Generate.phase not in phases_of(config):
        instead = f"use python -m gpt.generate {found.checkpoint}"
        if found.onnx:
            instead = "export it with inputs of past keys and values, as past_key_values.0.key"
        raise UserError(f"{words} has no KV cache to generate with; {instead}")
    if found.onnx:
        candidate = external.that_can(candidate, found)
        refuse_absent([engine], [candidate])
    tokenizer = None if prompt_ids else _tokenizer_of(found, config)
    ids = list(prompt_ids) if tokenizer is None else tokenizer.encode(prompt)
    if not ids:
        raise UserError("no token ids: a model needs at least one to start from; give a --prompt")
    wanted = _room_for(ids, tokens, config)
    prepare(found, [candidate], [Generate.phase])
    loaded = _load(candidate, found, config, threads)
    if tokenizer is not None:
        print(prompt, end="", flush=True)
    seconds = _print_stream(loaded, tokenizer, ids, wanted)
    first_ms, rest_ms = seconds[0] * 1e3, sum(seconds[1:]) * 1e3
    each = f", {rest_ms / len(seconds[1:]):.3g} ms for each of {len(seconds) - 1} more" if seconds[1:] else ""
    print(f"{candidate.label}: {first_ms:.3g} ms to the first token{each}", file=sys.stderr)


def _tokenizer_of(artifacts: Artifacts, config: Model) -> Tokenizer:
    """Return the model's tokenizer; of an ONNX file the one beside it, or GPT-2's where it has as many tokens.

    Raises UserError where none is known.
    """
    if artifacts.onnx is None:
        return tokenizer_from_json(load_checkpoint(artifacts.checkpoint).tokenizer)
    beside, own = artifacts.onnx.with_name(TOKENIZER), external.read_external(artifacts.onnx).tokenizer
    if own is not None:
        tokenizer = tokenizer_from_json(own)
    elif beside.is_file():
        tokenizer = HuggingFaceTokenizer.of(read_json(beside), str(beside))
    else:
        tokenizer = gpt2_or_none(config.vocab_size)
    if isinstance(tokenizer, NoTokenizer):
        raise UserError(
            f"{artifacts.onnx}: nothing says what its {config.vocab_size:,} tokens are, as a {TOKENIZER} beside it "
            "would; put it there, or give the prompt in numbers, by --prompt-ids"
        )
    return tokenizer


def _candidate_of(engine: str, precision: str) -> Candidate:
    """Return the engine's first variant that can generate. Raises UserError if there is none."""
    able = [each for each in find_candidates([engine], [precision]) if Generate.phase in each.phases]
    if not able:
        others = dict.fromkeys(
            each.engine for each in find_candidates((), [precision]) if Generate.phase in each.phases
        )
        raise UserError(f"engine {engine!r} has no KV cache to generate with; those that have: {', '.join(others)}")
    return able[0]


def _room_for(ids: list[int], tokens: int | None, config: Model) -> int:
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


def _load(candidate: Candidate, artifacts: Artifacts, config: Model, threads: int) -> Backend:
    module, name = candidate.factory.split(":")
    engine: Backend = getattr(importlib.import_module(module), name)()
    engine.load(artifacts, config, threads, candidate.variant)
    return engine


def _print_stream(engine: Backend, tokenizer: Tokenizer | None, ids: list[int], tokens: int) -> list[float]:
    """Print each token's text, or its number without a tokenizer, as it comes; return the seconds that each took."""
    seconds: list[float] = []

    def chosen_ids() -> Iterator[int]:
        last_s = time.perf_counter()
        for chosen in engine.stream(np.array([ids]), tokens):
            seconds.append(time.perf_counter() - last_s)
            yield int(chosen[0])  # its text is printed before the next one is timed
            last_s = time.perf_counter()

    for piece in map("{} ".format, chosen_ids()) if tokenizer is None else tokenizer.pieces(chosen_ids()):
        print(piece, end="", flush=True)
    print()
    return seconds


def main() -> None:
    """Parse the command line and generate."""
    tyro.cli(run, prog="python -m bench.generate")
