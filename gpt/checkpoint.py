"""A trained model as one file: written whole or not at all, and read without running anything from it."""

import hashlib
import io
import pickle
import zipfile
import zlib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt.bigram import Bigram
from gpt.cli import UserError
from gpt.config import GPTConfig, config_from_json
from gpt.files import ARTIFACTS, atomic_output, other_kind
from gpt.model import GPT
from gpt.tokenizer import NoTokenizer, tokenizer_from_json
from gpt.zoo import build_model

KIND = "gpt-frontend checkpoint"
VERSION = 1
SEAL = b"gpt-frontend sha256 "  # in the archive's comment, before the hash of all bytes up to it
NO_COMMENT = b"\0\0"  # ends an archive without a comment, as torch.save writes it


@dataclass(frozen=True, eq=False)  # tensors have no one truth to compare by
class Checkpoint:
    """All that the next room needs of a model.

    state: GPT's state dict, on the CPU. step: updates it was trained for. tokenizer: as `gpt.tokenizer` spells it in
    JSON. losses: {"step": [...], "train": [...], "val": [...]}, nats a token at each evaluation. sha256: of the file
    that it was read from, None for one that never was in a file.
    """

    config: GPTConfig
    state: dict[str, Tensor]
    step: int = 0
    tokenizer: dict[str, Any] = field(default_factory=NoTokenizer().to_json)
    losses: dict[str, list[float]] = field(default_factory=dict)
    sha256: str | None = None

    def build(self, attention: str = "explicit") -> GPT | Bigram:
        """Return the model with these weights, in eval mode. Raises UserError for an unknown attention."""
        model = build_model(self.config, attention)
        model.load_state_dict(self.state)
        return model.eval()


def state_of(model: GPT | Bigram) -> dict[str, Tensor]:
    """Return a copy of a model's state dict on the CPU; a tied head stays one tensor under two names."""
    state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
    return state | ({"lm_head.weight": state["transformer.wte.weight"]} if model.config.tied_head else {})


def save_checkpoint(path: Path | str, checkpoint: Checkpoint, training: dict[str, Any] | None = None) -> str:
    """Write a checkpoint and return the SHA-256 of its file. Raises UserError where it cannot be written.

    training: what `load_training` gives back to go on with, tensors and plain values; `load_checkpoint` leaves it out.
    Weights that are NaN or infinite are refused, so that what was good before is not replaced by them.
    """
    if broken := _not_finite(checkpoint.state):
        raise UserError(
            f"{broken} holds NaN or infinity at step {checkpoint.step}: training diverged, nothing is saved"
        )
    content = {each.name: getattr(checkpoint, each.name) for each in fields(checkpoint) if each.name != "sha256"}
    content |= {"kind": KIND, "version": VERSION, "config": asdict(checkpoint.config)}
    if training is not None:
        content["training"] = training
    buffer = io.BytesIO()  # not straight to the file: torch reports a full disk as a RuntimeError
    torch.save(content, buffer)
    sealed = _sealed(buffer.getvalue())
    with atomic_output(path) as part:
        part.write_bytes(sealed)
    return hashlib.sha256(sealed).hexdigest()


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Read what `save_checkpoint` wrote, with every weight checked against the config.

    The file is read once, and the bytes that are checked against their hash are those that are parsed.

    Raises UserError for a file that is missing, truncated, damaged, not one of ours, of another version of the format,
    or that would run code when loaded.
    """
    return _parse(Path(path), *_read(Path(path)))


def load_training(path: Path | str) -> tuple[Checkpoint, dict[str, Any]]:
    """Load a checkpoint and its training's state. Raises UserError as `load_checkpoint`, and where there is none."""
    content, sha256 = _read(Path(path))
    checkpoint = _parse(Path(path), content, sha256)
    if not isinstance(content.get("training"), dict):
        raise UserError(f"{path}: holds a model, but no training to go on with; use one of a run's step-….pt")
    return checkpoint, content["training"]


def _parse(path: Path, content: Any, sha256: str) -> Checkpoint:
    """Return the checkpoint in what `_read` gave. Raises UserError."""
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise UserError(f"{path}: not a checkpoint of this project; make one with: python -m gpt.train")
    if content.get("version") != VERSION:
        raise UserError(
            f"{path}: has version {content.get('version')!r} of the checkpoint format, this code reads {VERSION}; "
            "train again, or use the code that wrote it"
        )
    try:
        checkpoint = Checkpoint(
            config=config_from_json(content["config"]),
            state=content["state"],
            step=content["step"],
            tokenizer=tokenizer_from_json(content["tokenizer"]).to_json(),
            losses=content["losses"],
            sha256=sha256,
        )
    except (AttributeError, KeyError, TypeError, UserError) as error:
        raise UserError(f"{path}: is damaged ({error}); train again") from error
    _check_fit(path, checkpoint)
    return checkpoint


def seeded_checkpoint(config: GPTConfig, seed: int = 0) -> Checkpoint:
    """Return a model with random weights that depend on `seed` alone, for comparing engines without training one.

    GPT's own initialisation, but every gain and bias is moved by a normal of std 0.1, so that an engine that leaves
    one out is caught. It has no tokenizer.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = build_model(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return Checkpoint(config, state_of(model))


def _sealed(archive: bytes) -> bytes:
    """Return a zip archive whose comment holds the hash of all bytes before it; readers of archives pass over that."""
    assert archive.endswith(NO_COMMENT)
    head = archive.removesuffix(NO_COMMENT) + (len(SEAL) + 64).to_bytes(2, "little") + SEAL
    return head + hashlib.sha256(head).hexdigest().encode()


def _read(path: Path) -> tuple[Any, str]:
    """Return the object in a file of torch.save, by tensors and plain values only, and the file's SHA-256.

    Raises UserError.
    """
    try:
        content = path.read_bytes()
        _check_whole(path, content)
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        return found, hashlib.sha256(content).hexdigest()
    except UserError:
        raise
    except OSError as error:
        if kind := other_kind(path, "checkpoint"):
            raise UserError(f"{path}: not a checkpoint but {kind}") from error
        make = "python -m gpt.train" + ("" if path == ARTIFACTS / "ckpt.pt" else f" -o {path}")
        raise UserError(f"{path}: cannot be read ({error.strerror}); make one with: {make}") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: refused, because it holds more than tensors and plain values and could run code when loaded; "
            "use a checkpoint that python -m gpt.train wrote"
        ) from error
    except (RuntimeError, ValueError) as error:  # torch's words for a zip file that torch.save did not write
        raise UserError(f"{path}: not a checkpoint; make one with: python -m gpt.train") from error


def _check_whole(path: Path, content: bytes) -> None:
    """Raise UserError unless a file is a zip archive, as torch.save writes, that matches its hash and checksums.

    An archive without a comment is of torch.save alone, or from before there was a hash: its parts have checksums.
    """
    if not content.startswith(b"PK\x03\x04"):
        kind = other_kind(path, "checkpoint")
        raise UserError(
            f"{path}: not a checkpoint" + (f" but {kind}" if kind else "; make one with: python -m gpt.train")
        )
    bare = content[-22:-18] == b"PK\5\6" and content.endswith(NO_COMMENT)
    head, sha256 = content[:-64], content[-64:]
    if not bare and not (head.endswith(SEAL) and hashlib.sha256(head).hexdigest().encode() == sha256):
        raise UserError(f"{path}: is truncated or damaged (it does not match its hash); train again, or copy it again")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, RuntimeError, ValueError, zlib.error):
        damaged = "its table of contents"  # one of these, by what the damage looks like to zipfile
    if damaged:
        raise UserError(f"{path}: is truncated or damaged ({damaged}); train again, or copy it again")


def _check_fit(path: Path, checkpoint: Checkpoint) -> None:
    """Raise UserError unless the state and the tokenizer are of the config's shape."""
    with torch.device("meta"):  # shapes without memory
        wanted = build_model(checkpoint.config).state_dict()
    state = checkpoint.state
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"{path}: is damaged (its state is not a dict of tensors); train again")
    for name in sorted(wanted.keys() | state.keys()):
        expected, found = (_describe(tensors.get(name)) for tensors in (wanted, state))
        if expected != found:
            raise UserError(f"{path}: does not fit its own config: {name} is {found}, not {expected}; train again")
    if broken := _not_finite(state):
        raise UserError(f"{path}: {broken} holds NaN or infinity: training diverged; use an earlier checkpoint")
    tied = checkpoint.config.tied_head
    if tied and not torch.equal(state["lm_head.weight"], state["transformer.wte.weight"]):
        raise UserError(
            f"{path}: does not fit: lm_head.weight differs from wte.weight, to which it is tied; train again"
        )
    tokenizer = tokenizer_from_json(checkpoint.tokenizer)
    if not isinstance(tokenizer, NoTokenizer) and tokenizer.vocab_size != checkpoint.config.vocab_size:
        raise UserError(
            f"{path}: does not fit: its tokenizer has {tokenizer.vocab_size} ids, but "
            f"vocab_size={checkpoint.config.vocab_size}"
        )


def _not_finite(state: dict[str, Tensor]) -> str | None:
    """The name of the first weight that holds NaN or infinity; None if all are numbers."""
    return next((name for name, tensor in state.items() if not torch.isfinite(tensor).all()), None)


def _describe(tensor: Tensor | None) -> str:
    if tensor is None:
        return "absent"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
