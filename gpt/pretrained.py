"""python -m gpt.pretrained gpt2 -o artifacts/ckpt.pt
python -m gpt.pretrained path/to/folder -o artifacts/ckpt.pt

Make a checkpoint of GPT-2's published weights, or of a GPT-2 that Hugging Face's transformers saved in a folder.
"""

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is one line too
    from gpt.cli import run_main

    run_main("gpt.pretrained")

import hashlib
import http.client
import json
import os
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gpt.checkpoint import Checkpoint, save_checkpoint
from gpt.cli import UserError
from gpt.config import GPTConfig
from gpt.files import atomic_output, check_output, hold_output
from gpt.progress import progress_bar
from gpt.sealed import check_folder
from gpt.tokenizer import GPT2Tokenizer, NoTokenizer, Tokenizer
from gpt.zoo import weights_of

PUBLISHED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
SEAL = "gpt_frontend.json"  # the hashes of the files of a folder that export.huggingface wrote
CONFIG, WEIGHTS, SHARDS = "config.json", "model.safetensors", "model.safetensors.index.json"
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
# a config.json must say this, if it says anything, for the model to be ours (transformers' GPT2Config, its defaults)
REQUIRED = {
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # kept as [in, out], where nn.Linear has [out, in]
NAME = re.compile(r"\w[\w.-]*")  # of a file in the same folder
MASKS = (".attn.bias", ".attn.masked_bias")  # constants that older files hold among the weights
# hashes GPT-2's merges, one a line (tiktoken's vocab.bpe without its first line)
MERGES_SHA256 = "04e3597d7996f292ca9b8b7285ca4d58a6ae171ac47d73fc7140ceb0c7a6bbc0"
TIMEOUT_S = 30  # without a byte from the server


def load_pretrained(source: str) -> Checkpoint:
    """Load a published GPT-2, by name, or a local Hugging Face folder with safetensors, as a checkpoint in float32.

    A name is downloaded once. The tokenizer is GPT-2's, or none where the folder holds another one. Raises UserError
    for an unknown source, a failed download, files that are damaged, and models that are not a GPT-2.
    """
    folder = Path(source)
    if folder.is_dir():
        published = False
    elif source in PUBLISHED:
        folder, published = _download(source), True
    else:
        raise UserError(f"{source}: no such folder, and not one of {', '.join(PUBLISHED)}")
    if (folder / SEAL).exists():
        check_folder(folder, SEAL, "python -m export.huggingface")
    config = _config_of(folder)
    state = _state_of(folder, config)
    tokenizer = GPT2Tokenizer() if published else _tokenizer_of(folder, config)
    return Checkpoint(config, state, tokenizer=tokenizer.to_json())


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


def _config_of(folder: Path) -> GPTConfig:
    """Read the shape from a folder's config.json. Raises UserError for a model that is not a GPT-2 of ours."""
    path = folder / CONFIG
    found = _read_json(path)
    if found.get("model_type", "gpt2") != "gpt2":
        raise UserError(f"{path}: model_type={found['model_type']!r}, not 'gpt2', the only kind that can be read")
    for name, wanted in REQUIRED.items():
        if found.get(name, wanted) != wanted:
            raise UserError(f"{path}: {name}={found[name]!r}: must be {wanted!r}, as in the published models")
    activation = found.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise UserError(f"{path}: activation_function={activation!r}: must be one of {', '.join(ACTIVATIONS)}")
    try:
        config = GPTConfig(
            block_size=found.get("n_positions", 1024),
            vocab_size=found.get("vocab_size", 50257),
            n_layer=found.get("n_layer", 12),
            n_head=found.get("n_head", 12),
            n_embd=found.get("n_embd", 768),
            activation=ACTIVATIONS[activation],
            tied_head=found.get("tie_word_embeddings", True),
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if found.get("n_inner") not in (None, 4 * config.n_embd):
        raise UserError(f"{path}: n_inner={found['n_inner']!r}: must be 4 times n_embd={config.n_embd}, or absent")
    return config


def _state_of(folder: Path, config: GPTConfig) -> dict[str, Tensor]:
    """Read a folder's weights under our names, in float32. Raises UserError unless they are exactly the config's."""
    state: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        for name, tensor in _read_weights(path).items():
            if name.endswith(MASKS):
                continue
            name = name if name.startswith("lm_head.") else "transformer." + name.removeprefix("transformer.")
            if not tensor.is_floating_point() or not torch.isfinite(tensor.to(torch.float32)).all():
                what = "NaN or infinity" if tensor.is_floating_point() else f"whole numbers ({tensor.dtype})"
                raise UserError(f"{path}: {name} holds {what}; take other weights")
            turned = tensor.t() if name.endswith(CONV1D) and tensor.dim() == 2 else tensor
            state[name] = turned.to(torch.float32).contiguous()
    if config.tied_head and "transformer.wte.weight" in state:  # the published files leave the head out
        state["lm_head.weight"] = state["transformer.wte.weight"]
    try:
        wanted = weights_of(config, len(state))
    except UserError as error:
        raise UserError(f"{folder}: does not fit its {CONFIG}: {error}") from error
    for name in sorted(wanted.keys() | state.keys()):
        expected, shape = (tensors[name].shape if name in tensors else None for tensors in (wanted, state))
        if expected != shape:
            here, there = (str(list(each)) if each is not None else "absent" for each in (shape, expected))
            raise UserError(f"{folder}: does not fit its {CONFIG}: {name} is {here}, not {there}")
    return state


def _weight_files(folder: Path) -> list[Path]:
    """Return one file, or the several into which a large model was split. Raises UserError."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / SHARDS).is_file():
        raise UserError(
            f"{folder}: holds no {WEIGHTS}; save the model there with transformers' save_pretrained, which writes one"
        )
    table = _read_json(folder / SHARDS).get("weight_map")
    names: list[Any] = list(table.values()) if isinstance(table, dict) else [table]
    for name in names:
        if not isinstance(name, str) or not NAME.fullmatch(name):  # a path with `..` leads out of the folder
            raise UserError(f"{folder / SHARDS}: weight_map names {name!r}, no file of this folder; save it again")
    return [folder / name for name in sorted(set(names))]


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); download or save it again") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); take a folder of transformers") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: is not a JSON object; take a folder of transformers")
    return found


def _tokenizer_of(folder: Path, config: GPTConfig) -> Tokenizer:
    """Return GPT-2's tokenizer if the vocabulary has its size and the folder tells of no other, else none."""
    merges = _merges_of(folder)
    if config.vocab_size != GPT2Tokenizer().vocab_size:
        return NoTokenizer()
    if (
        merges is not None
        and hashlib.sha256("\n".join(merges).encode(errors="surrogatepass")).hexdigest() != MERGES_SHA256
    ):
        return NoTokenizer()
    return GPT2Tokenizer()


def _merges_of(folder: Path) -> list[str] | None:
    """Read the byte pairs that a folder's tokenizer joins, "a b" each, in their order; None if it has no tokenizer."""
    path = folder / "merges.txt"
    if path.is_file():
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read as UTF-8 text ({error}); save the tokenizer again") from error
        return [line for line in lines if line.strip() and not line.startswith("#version")]
    path = folder / "tokenizer.json"
    if path.is_file():
        model = _read_json(path).get("model", {})
        merges = model.get("merges", []) if isinstance(model, dict) else None
        if not isinstance(merges, list):
            raise UserError(f"{path}: has no list of merges in its model; save the tokenizer again")
        return [" ".join(map(str, merge)) if isinstance(merge, list) else str(merge) for merge in merges]
    return None


def run(
    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")],
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="CKPT")] = Path("artifacts/ckpt.pt"),
) -> None:
    """Make a checkpoint of GPT-2's published weights, or of a GPT-2 that transformers saved in a folder.

    Args:
        source: gpt2, gpt2-medium, gpt2-large or gpt2-xl (downloaded once), or a folder with safetensors
        output: the checkpoint to write
    """
    check_output(output, *(Path(source).iterdir() if Path(source).is_dir() else ()))
    with hold_output(output):
        checkpoint = load_pretrained(source)
        save_checkpoint(output, checkpoint)
    config = checkpoint.config
    print(
        f"wrote {output}: {config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, "
        f"{checkpoint.build().parameter_count():,} parameters, tokenizer {checkpoint.tokenizer['kind']}"
    )


def main() -> None:
    """Parse the command line and write the checkpoint."""
    tyro.cli(run, prog="python -m gpt.pretrained")
