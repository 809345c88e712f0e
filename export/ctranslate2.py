"""Checkpoint to a folder that CTranslate2 loads, by its own converter from a Hugging Face folder.

python -m export.ctranslate2                           # artifacts/ckpt.pt to artifacts/ctranslate2
"""

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is one line too
    from gpt.cli import run_main

    run_main("export.ctranslate2")

import io
import json
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import tyro

from export.huggingface import export_huggingface
from gpt.checkpoint import load_checkpoint
from gpt.cli import UserError
from gpt.config import GPTConfig
from gpt.files import atomic_output, beside, check_replaceable, find_input
from gpt.foreign.huggingface import TOKENIZER
from gpt.sealed import check_folder, read_folder, seal_folder

NEEDED = ("ctranslate2", "transformers")
VOCABULARY, DESCRIPTION = "vocabulary.json", "model.json"
FILES = ("model.bin", "config.json", VOCABULARY, DESCRIPTION)
ORIGIN = "checkpoint_sha256"
REMAKE = "python -m export.ctranslate2"


def convert_ctranslate2(checkpoint_path: Path, output: Path) -> Path:
    """Write a checkpoint as a float32 model of CTranslate2, which makes fewer bits of it when it loads it.

    Raises UserError for a bad checkpoint, a bigram, an absent package, and an output that cannot be written or is
    another folder's place.
    """
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise UserError(f"CTranslate2's converter is not installed: pip install {' '.join(missing)}")
    check_replaceable(output, is_ours, "such model of ours")
    checkpoint = load_checkpoint(checkpoint_path)
    _check_computed(checkpoint_path, checkpoint.config)
    from ctranslate2.converters import TransformersConverter
    from transformers.utils import logging

    logging.set_verbosity_error()  # the converter's own call is of a form that transformers advises against
    with atomic_output(output, directory=True) as folder, TemporaryDirectory(dir=folder.parent) as scratch:
        source = export_huggingface(checkpoint_path, Path(scratch, "huggingface"))
        _complete_vocabulary(source / TOKENIZER, checkpoint.config.vocab_size)
        with redirect_stderr(io.StringIO()):  # transformers shows a progress bar
            TransformersConverter(str(source)).convert(str(folder), force=True)
        seal_folder(folder, DESCRIPTION, {ORIGIN: checkpoint.sha256})
    return output


def _check_computed(path: Path, config: GPTConfig) -> None:
    """Raise UserError for what the converter would leave out of a GPT-2 without a word, and so compute otherwise."""
    usual = GPTConfig()
    for name in ("layer_norm_epsilon", "scale_attn_weights", "scale_attn_by_inverse_layer_idx"):
        if (value := getattr(config, name)) != getattr(usual, name):
            raise UserError(f"{path}: {name}={value!r}: CTranslate2's GPT-2 has {getattr(usual, name)!r} only")
    if config.activation == "tanh":
        raise UserError(f"{path}: activation='tanh': CTranslate2's GPT-2 does not have it")


def _complete_vocabulary(path: Path, vocab_size: int) -> None:
    """Give names to the ids that a tokenizer leaves out, as of a padded vocabulary: CTranslate2 wants one for each."""
    found = json.loads(path.read_text(encoding="utf-8"))
    vocab, added = found["model"]["vocab"], found.get("added_tokens") or []
    if isinstance(vocab, dict):
        used = {*vocab.values(), *(each["id"] for each in added)}
        found["model"]["vocab"] = vocab | {f"<{index}>": index for index in range(vocab_size) if index not in used}
        path.write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")


def is_ours(folder: Path) -> bool:
    """Return whether a folder holds nothing but what this file writes, so that a new one may replace it."""
    return folder.is_dir() and {file.name for file in folder.iterdir()} <= set(FILES)


def origin_of(folder: Path) -> str:
    """Return the SHA-256 of the checkpoint that a folder came from, once all its files were checked.

    Raises UserError for a folder that is damaged or not made by us.
    """
    found = check_folder(folder, DESCRIPTION, REMAKE).get(ORIGIN)
    if not isinstance(found, str):
        raise UserError(f"{folder}: not a model of CTranslate2 made by us; make one with {REMAKE}")
    return found


def read_files(folder: Path) -> dict[str, bytes]:
    """Read what CTranslate2 loads, by name: the very bytes that were checked. Raises UserError as `origin_of`."""
    return read_folder(folder, DESCRIPTION, REMAKE)[1]


def ctranslate2_command(
    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CKPT")] = Path("artifacts/ckpt.pt"),
    output: Annotated[
        Path | None,
        tyro.conf.arg(aliases=["-o"], metavar="DIR", help_behavior_hint="(default: ctranslate2 beside the checkpoint)"),
    ] = None,
) -> None:
    """Write a checkpoint as a model of CTranslate2, by way of a Hugging Face GPT-2 folder.

    Args:
        checkpoint: what python -m gpt.train wrote, or a GPT-2 that others saved
        output: the folder to write
    """
    checkpoint = find_input(checkpoint)
    folder = convert_ctranslate2(checkpoint, output or beside(checkpoint, "ctranslate2"))
    size_mb = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    print(f"wrote {folder} ({size_mb:.1f} MB): ctranslate2.Generator({str(folder)!r}) loads it")


def main() -> None:
    """Parse the command line and convert."""
    tyro.cli(ctranslate2_command, prog="python -m export.ctranslate2")
