"""Checkpoint to a folder that Hugging Face's transformers loads as a GPT-2, and that others' tools convert from there.

python -m export.huggingface                           # artifacts/ckpt.pt to artifacts/huggingface
python -m export.huggingface my.pt -o my-gpt2
"""

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is one line too
    from gpt.cli import run_main

    run_main("export.huggingface")

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from safetensors.torch import save_file
from torch import Tensor

from gpt.checkpoint import Checkpoint, load_checkpoint
from gpt.cli import UserError
from gpt.files import atomic_output, beside, check_replaceable, find_input
from gpt.foreign.huggingface import (
    ACTIVATIONS,
    CONFIG,
    SEAL,
    SEALED_TOKENIZER,
    SHARED,
    TOKENIZER,
    WEIGHTS,
    byte_pairs,
    pipeline,
    read_folder,
)
from gpt.foreign.names import CONV1D
from gpt.sealed import seal_folder
from gpt.tokenizer import CharTokenizer, GPT2Tokenizer, HuggingFaceTokenizer, tokenizer_from_json

TOKENIZER_CONFIG = "tokenizer_config.json"
FILES = (CONFIG, WEIGHTS, TOKENIZER, TOKENIZER_CONFIG, SEAL)
END_OF_TEXT = "<|endoftext|>"


def export_huggingface(checkpoint_path: Path, output: Path) -> Path:
    """Write a checkpoint as a GPT-2 of transformers: config.json, float32 safetensors and a fast tokenizer.

    Biases that the model does not have are written as zeros: transformers' GPT-2 always has them. A checkpoint without
    a tokenizer gets one that spells id 7 as `<7>`, since converters ask for a vocabulary. Before the folder gets its
    name it is read back by `gpt.foreign` and every weight compared. Raises UserError for a bad checkpoint, a bigram
    and an output that cannot be written or is another folder's place; RuntimeError if what was read back differs.
    """
    check_replaceable(output, is_ours, "GPT-2 folder of ours")
    checkpoint = load_checkpoint(checkpoint_path)
    if checkpoint.config.model != "gpt":
        raise UserError(f"{checkpoint_path}: is a {checkpoint.config.model}; only a gpt can be written as a GPT-2")
    with atomic_output(output, directory=True) as folder:
        save_file(weights_of(checkpoint), folder / WEIGHTS, metadata={"format": "pt"})
        contents = {CONFIG: config_of(checkpoint), **tokenizer_of(checkpoint)}
        for name, content in contents.items():
            (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        seal_folder(folder, SEAL, {"checkpoint_sha256": checkpoint.sha256, SEALED_TOKENIZER: checkpoint.tokenizer})
        prove(checkpoint, folder)
    return output


def is_ours(folder: Path) -> bool:
    """Return whether a folder holds nothing but what this file writes, so that a new one may replace it."""
    return folder.is_dir() and {file.name for file in folder.iterdir()} <= set(FILES)


def config_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the content of config.json, as transformers' GPT2Config reads it."""
    config = checkpoint.config
    end = GPT2Tokenizer().end_of_text if checkpoint.tokenizer["kind"] == "gpt2" else None
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_positions": config.block_size,
        **{name: getattr(config, name) for name in SHARED},
        "activation_function": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation),
        "tie_word_embeddings": config.tied_head,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "bos_token_id": end,
        "eos_token_id": end,
    }


def weights_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Name the state as transformers does, and as we do: Conv1D weights turned to [in, out], absent biases zero."""
    weights = {}
    for name, tensor in checkpoint.state.items():
        weights[name] = (tensor.t() if name.endswith(CONV1D) else tensor).contiguous()
        if name.startswith(("transformer.h.", "transformer.ln_f.")) and name.endswith(".weight"):
            bias = name.removesuffix("weight") + "bias"
            weights.setdefault(bias, checkpoint.state.get(bias, torch.zeros(tensor.shape[0])))
    if checkpoint.config.tied_head:
        del weights["lm_head.weight"]  # transformers ties it to wte, as its own files do
    return weights


def tokenizer_of(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Return the contents of tokenizer.json, in the package `tokenizers`' format, and of tokenizer_config.json."""
    tokenizer = tokenizer_from_json(checkpoint.tokenizer)
    if isinstance(tokenizer, GPT2Tokenizer):
        found, special = _gpt2s(tokenizer), END_OF_TEXT
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        found, special = json.loads(tokenizer.content), tokenizer.first_token
    else:
        if isinstance(tokenizer, CharTokenizer):
            tokens, pattern = list(tokenizer.characters), r"[\s\S]"
        else:
            tokens, pattern = [f"<{index}>" for index in range(checkpoint.config.vocab_size)], "<[0-9]+>"
        # CTranslate2 cannot load a model without special tokens. One more would not fit the model, so the first one,
        # mostly a line's end, stands in; config.json names none, so transformers' generate stops at none.
        found, special = _words(tokens, {"Regex": pattern}), tokens[0]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": checkpoint.config.block_size,
        "clean_up_tokenization_spaces": False,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), special),
    }
    return {TOKENIZER: found, TOKENIZER_CONFIG: settings}


def prove(checkpoint: Checkpoint, folder: Path) -> None:
    """Read the folder back; raises RuntimeError unless shape and weights are the checkpoint's, bit for bit."""
    found = read_folder(folder)
    expected = replace(checkpoint.config, bias=True, dropout=0.0)
    if found.config != expected:
        raise RuntimeError(f"{folder}: reads back as {found.config}, not {expected}")
    for name, tensor in found.state.items():
        if not torch.equal(tensor, checkpoint.state.get(name, torch.zeros_like(tensor))):
            raise RuntimeError(f"{folder}: {name} reads back different")
    if found.tokenizer != checkpoint.tokenizer:
        raise RuntimeError(f"{folder}: its tokenizer reads back as another")


def _words(tokens: list[str], pattern: dict[str, str]) -> dict[str, Any]:
    """Make a tokenizer that cuts a text where the pattern matches and looks each piece up; one it lacks is an error."""
    return pipeline(
        model={"type": "WordLevel", "vocab": {token: i for i, token in enumerate(tokens)}, "unk_token": "<unk>"},
        pre_tokenizer={"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False},
        decoder={"type": "Fuse"},
    )


def _gpt2s(tokenizer: GPT2Tokenizer) -> dict[str, Any]:
    """Return GPT-2's own tokenizer, its merges worked out from the bytes of its tokens."""
    ranks = {tokenizer.bytes_of(index): index for index in range(tokenizer.end_of_text)}
    spell = _spelling()
    spelled = {token: "".join(spell[byte] for byte in token) for token in ranks}
    merges = [
        " ".join(spelled[part] for part in _parts_of(token, ranks)) for token, rank in ranks.items() if len(token) > 1
    ]
    end = {"id": tokenizer.end_of_text, "content": END_OF_TEXT, "special": True}
    end |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    vocab = {spelled[token]: rank for token, rank in ranks.items()} | {END_OF_TEXT: tokenizer.end_of_text}
    return byte_pairs(vocab, merges, [end])


def _parts_of(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Return the two tokens whose merge made this one: byte-pair encoding of its bytes until two are left."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        merged = [ranks.get(one + other, len(ranks)) for one, other in pairwise(parts)]
        i = merged.index(min(merged))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _spelling() -> list[str]:
    """Return each byte's character in GPT-2's files: bytes_to_unicode of openai/gpt-2's encoder.py."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def huggingface_command(
    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CKPT")] = Path("artifacts/ckpt.pt"),
    output: Annotated[
        Path | None,
        tyro.conf.arg(aliases=["-o"], metavar="DIR", help_behavior_hint="(default: huggingface beside the checkpoint)"),
    ] = None,
) -> None:
    """Write a checkpoint as a Hugging Face GPT-2 folder, and prove that it reads back the same.

    Args:
        checkpoint: what python -m gpt.train wrote, or a GPT-2 that others saved
        output: the folder to write
    """
    checkpoint = find_input(checkpoint)
    folder = export_huggingface(checkpoint, output or beside(checkpoint, "huggingface"))
    size_mb = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    print(f"wrote {folder} ({size_mb:.1f} MB): AutoModelForCausalLM.from_pretrained({str(folder)!r}) loads it")


def main() -> None:
    """Parse the command line and write the folder."""
    tyro.cli(huggingface_command, prog="python -m export.huggingface")
