"""python -m gpt.pretrained gpt2 -o artifacts/ckpt.pt
python -m gpt.pretrained path/to/folder -o artifacts/ckpt.pt
python -m gpt.pretrained theirs.pt --heads 12 --activation gelu_tanh -o artifacts/ckpt.pt

Make a checkpoint of GPT-2's published weights, or of a GPT-2 that others saved; flags say what its file does not.
"""

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is one line too
    from gpt.cli import run_main

    run_main("gpt.pretrained")

import http.client
import os
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gpt.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from gpt.cli import UserError
from gpt.files import ARTIFACTS, atomic_output, check_output, hold_output
from gpt.foreign import NO_HINTS, Hints
from gpt.foreign.huggingface import CONFIG, WEIGHTS
from gpt.progress import progress_bar
from gpt.tokenizer import GPT2Tokenizer

PUBLISHED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
TIMEOUT_S = 30  # without a byte from the server


def load_pretrained(source: str, hints: Hints = NO_HINTS) -> Checkpoint:
    """Load a published GPT-2, by name, or what `load_checkpoint` reads, as a checkpoint in float32.

    A name is downloaded once, and its tokenizer is GPT-2's. hints: what a file does not say. Raises UserError for an
    unknown source, a failed download, files that are damaged, and models that are not a GPT-2.
    """
    if Path(source).exists() or source not in PUBLISHED:
        if not Path(source).exists():
            raise UserError(f"{source}: no such file or folder, and not one of {', '.join(PUBLISHED)}")
        if Path(source).is_dir() and not (Path(source) / CONFIG).is_file():
            raise UserError(f"{source}: a folder without a {CONFIG}; give one of transformers, or the file of a model")
        return load_checkpoint(source, hints)
    return replace(load_checkpoint(_download(source)), tokenizer=GPT2Tokenizer().to_json())


def cache_folder() -> Path:
    """Return where downloads are kept: `gpt-frontend` in XDG_CACHE_HOME, by default ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt-frontend"


def _download(name: str) -> Path:
    """Return the folder with a published model's files, fetched unless they are there. Raises UserError."""
    folder = cache_folder() / name
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            # HF_ENDPOINT names a mirror, as it does for Hugging Face's own tools
            endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
            _fetch(f"{endpoint}/openai-community/{name}/resolve/main/{file}", folder / file, f"{name}/{file}")
    return folder


def _fetch(url: str, path: Path, title: str) -> None:
    """Fetch one file over HTTP, whole or not at all. Raises UserError."""
    with (
        atomic_output(path) as part,
        part.open("wb") as file,
        progress_bar(desc=title, unit="B", unit_scale=True) as bar,
    ):
        for block, total in _blocks(url):
            bar.total = total
            file.write(block)
            bar.update(len(block))


def _blocks(url: str) -> Iterator[tuple[bytes, int]]:
    """Yield the pieces of a file on a server, each with the whole's size in bytes. Raises UserError unless all came."""
    came = 0
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
            total = int(response.headers["Content-Length"])
            while block := response.read(1 << 20):
                came += len(block)
                yield block, total
        if came != total:
            raise OSError(f"{came} of {total} bytes came")
    except (OSError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
        raise UserError(
            f"{url}: cannot be downloaded ({getattr(error, 'reason', error)}); try again, or where there is no network "
            f"give a folder that holds the model's {CONFIG} and {WEIGHTS}"
        ) from error


def run(
    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")],
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="CKPT")] = ARTIFACTS / "ckpt.pt",
    heads: int | None = None,
    activation: Literal["gelu_tanh", "gelu", "relu", "quick_gelu", "silu", "tanh"] | None = None,
) -> None:
    """Make a checkpoint of GPT-2's published weights, or of a GPT-2 that others saved.

    Args:
        source: gpt2, gpt2-medium, gpt2-large or gpt2-xl (downloaded once), a folder of transformers, or a file: of
            nanoGPT, build-nanogpt, minGPT, llm.c, Lightning, or with a state dict, also as safetensors
        output: the checkpoint to write
        heads: attention heads a layer, if the file does not say
        activation: of the MLP, if the file does not say or is older than what is known of its kind; gelu is exact
    """
    path = Path(source)
    check_output(output, *(path.iterdir() if path.is_dir() else [path] if path.exists() else []))
    with hold_output(output):
        checkpoint = load_pretrained(source, Hints(heads, activation))
        save_checkpoint(output, checkpoint)
    config = checkpoint.config
    print(
        f"wrote {output}: {checkpoint.kind} model, {config.n_layer} layers, {config.n_head} heads, width "
        f"{config.n_embd}, {config.activation}, {checkpoint.build().parameter_count():,} parameters, tokenizer "
        f"{checkpoint.tokenizer['kind']}"
    )


def main() -> None:
    """Parse the command line and write the checkpoint."""
    tyro.cli(run, prog="python -m gpt.pretrained")
