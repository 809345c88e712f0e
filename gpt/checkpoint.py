"""A trained model as one file: written whole or not at all, and read without running anything from it.

What others saved is read too, by `gpt.foreign`.
"""

import hashlib
import io
import pickle
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt.bigram import Bigram
from gpt.cli import UserError
from gpt.config import GPTConfig, config_from_json
from gpt.files import ARTIFACTS, atomic_output, other_kind
from gpt.foreign import NO_HINTS, ForeignModel, Hints
from gpt.foreign.huggingface import CONFIG, folder_sha256, is_safetensors, read_folder, read_safetensors
from gpt.foreign.llmc import is_llmc, read_llmc
from gpt.foreign.states import read_object, read_state
from gpt.foreign.unpickle import LEGACY, load_torch, name_of_refused
from gpt.model import GPT
from gpt.tokenizer import NoTokenizer, tokenizer_from_json
from gpt.zoo import build_model, weights_of

KIND = "gpt-frontend checkpoint"
VERSION = 1
SEAL = b"gpt-frontend sha256 "  # in the archive's comment, before the hash of all bytes up to it
NO_COMMENT = b"\0\0"  # ends an archive without a comment, as torch.save writes it
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FOLDER = 0x10  # the bit of a zip archive's external attributes that says so
MOST = 2**62  # that a step or another counter may be: all that is computed of it still fits in 64 bits


class DamagedError(UserError):
    """Tells that a checkpoint's bytes are not as they were written, or that its numbers are none: an older one may do.

    reason: the message without the path before it and the advice behind it.
    """

    def __init__(self, path: Path, reason: str, advice: str) -> None:
        super().__init__(f"{path}: {reason}; {advice}")
        self.reason = reason


@dataclass(frozen=True, eq=False)  # tensors have no one truth to compare by
class Checkpoint:
    """All that the next room needs of a model.

    state: GPT's state dict, on the CPU. step: updates it was trained for. tokenizer: as `gpt.tokenizer` spells it in
    JSON. losses: {"step": [...], "train": [...], "val": [...]}, nats a token at each evaluation. sha256: of the file
    that it was read from, None for one that never was in a file. kind: whose file that was, in words.
    """

    config: GPTConfig
    state: dict[str, Tensor]
    step: int = 0
    tokenizer: dict[str, Any] = field(default_factory=NoTokenizer().to_json)
    losses: dict[str, list[float]] = field(default_factory=dict)
    sha256: str | None = None
    kind: str = "gpt-frontend's"

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
    Numbers that are NaN or infinite are refused, so that what was good before is not replaced by them.
    """
    if broken := _not_finite(checkpoint.state, training):
        raise UserError(
            f"{broken} holds NaN or infinity at step {checkpoint.step}: training diverged, nothing is saved"
        )
    content = {
        each.name: getattr(checkpoint, each.name) for each in fields(checkpoint) if each.name not in ("sha256", "kind")
    }
    content |= {"kind": KIND, "version": VERSION, "config": asdict(checkpoint.config)}
    if training is not None:
        content["training"] = training
    buffer = io.BytesIO()  # not straight to the file: torch reports a full disk as a RuntimeError
    torch.save(content, buffer)
    _seal(buffer)
    with atomic_output(path) as part:
        part.write_bytes(buffer.getbuffer())
    return hashlib.sha256(buffer.getbuffer()).hexdigest()


def load_checkpoint(path: Path | str, hints: Hints = NO_HINTS) -> Checkpoint:
    """Read what `save_checkpoint` wrote, with every weight checked against the config; or a GPT-2 that others saved.

    Those are recognised by their content: files of nanoGPT, build-nanogpt, minGPT, llm.c and Lightning, state dicts,
    safetensors, and folders of Hugging Face's. hints: what such a file does not say. A file is read once, and the bytes
    that are checked against their hash are those that are parsed.

    Raises UserError for a file that is missing, of another model, of another version of the format, that does not fit
    its own config, or that would run code when loaded; and DamagedError, which is one, for a file that is truncated or
    damaged or that holds NaN.
    """
    path = Path(path)
    if (path / CONFIG).is_file():
        return _checkpoint_of(read_folder(path, hints), folder_sha256(path))
    content = _read_bytes(path)
    sha256 = hashlib.sha256(content).hexdigest()
    if is_llmc(content):
        return _checkpoint_of(read_llmc(path, content, hints), sha256)
    if is_safetensors(content):
        return _checkpoint_of(read_state(path, read_safetensors(path, content), {}, hints), sha256)
    found = _open(path, content)
    if _is_ours(found):
        return _parse(path, found, sha256)
    return _checkpoint_of(read_object(path, found, hints), sha256)


def load_training(path: Path | str) -> tuple[Checkpoint, dict[str, Any]]:
    """Load a checkpoint and its training's state. Raises UserError as `load_checkpoint`, and where there is none.

    Of that state only this is checked, that no number in it is NaN or infinite; what it must hold depends on the run.
    """
    bytes_ = _read_bytes(Path(path))
    content = _open(Path(path), bytes_)
    if not _is_ours(content):
        raise UserError(
            f"{path}: not a checkpoint of this project, and another's training cannot be gone on with; begin from its "
            f"weights with: python -m gpt.train --init-from {path} -o artifacts/ckpt.pt"
        )
    checkpoint = _parse(Path(path), content, hashlib.sha256(bytes_).hexdigest())
    if not isinstance(content.get("training"), dict):
        raise UserError(f"{path}: holds a model, but no training to go on with; use one of a run's step-….pt")
    _check_finite(Path(path), content["training"])
    return checkpoint, content["training"]


def _is_ours(found: Any) -> bool:
    return isinstance(found, dict) and found.get("kind") == KIND


def _checkpoint_of(found: ForeignModel, sha256: str) -> Checkpoint:
    return Checkpoint(found.config, found.state, found.step, found.tokenizer, sha256=sha256, kind=found.kind)


def _parse(path: Path, content: Any, sha256: str) -> Checkpoint:
    """Return the checkpoint in what `_open` gave, which is ours. Raises UserError."""
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
    _check_numbers(path, checkpoint)
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


def _seal(archive: io.BytesIO) -> None:
    """Put the hash of all bytes before it into a zip archive's comment, which readers of archives pass over.

    In place, as a checkpoint with its training's state takes gigabytes.
    """
    archive.seek(-len(NO_COMMENT), io.SEEK_END)
    assert archive.read() == NO_COMMENT
    archive.seek(-len(NO_COMMENT), io.SEEK_END)
    archive.write((len(SEAL) + 64).to_bytes(2, "little") + SEAL)
    sha256 = hashlib.sha256(archive.getbuffer()).hexdigest()
    archive.write(sha256.encode())


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        if kind := other_kind(path, "checkpoint"):
            raise UserError(f"{path}: not a checkpoint but {kind}") from error
        make = "python -m gpt.train" + ("" if path == ARTIFACTS / "ckpt.pt" else f" -o {path}")
        raise UserError(f"{path}: cannot be read ({error.strerror}); make one with: {make}") from error


def _open(path: Path, content: bytes) -> Any:
    """Return the object in a file of torch.save: tensors, plain values and inert stand-ins. Raises UserError."""
    try:
        if not content.startswith(LEGACY):  # which has neither a hash nor checksums
            _check_whole(path, content)
        return load_torch(content)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: refused, because it holds more than tensors and plain values and could run code when loaded "
            f"({name_of_refused(error)}); save the model's state_dict() alone"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # torch raises many kinds for an archive that torch.save did not write
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        if "PytorchStreamReader" in reason:  # its table of contents is damaged where zipfile does not look
            raise DamagedError(path, f"not a checkpoint ({reason})", "make one with: python -m gpt.train") from error
        raise UserError(f"{path}: not a checkpoint ({reason}); make one with: python -m gpt.train") from error


def _check_whole(path: Path, content: bytes) -> None:
    """Raise DamagedError unless a file is a zip archive, as torch.save writes, that matches its hash and checksums.

    An archive without a comment is of torch.save alone, or from before there was a hash: its parts have checksums.
    """
    if not content.startswith(b"PK\x03\x04"):
        other, _, advice = (other_kind(path, "checkpoint") or "").partition("; ")
        reason = f"not a checkpoint but {other}" if other else "not a checkpoint"
        raise DamagedError(path, reason, advice or "it is no file of torch.save, safetensors or llm.c")
    bare = content[-22:-18] == b"PK\5\6" and content.endswith(NO_COMMENT)
    sealed = content[-64 - len(SEAL) : -64] == SEAL
    if not bare and not (sealed and hashlib.sha256(memoryview(content)[:-64]).hexdigest().encode() == content[-64:]):
        reason = "is truncated or damaged (it does not match its hash)"
        raise DamagedError(path, reason, "train again, or copy it again")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            # torch would read nothing of a part that a flipped bit calls a folder, and leave its memory as it was
            folders = (part.filename for part in archive.infolist() if part.external_attr & FOLDER)
            damaged = archive.testzip() or next(folders, None)
    except Exception:  # zipfile and its decompressors raise many kinds, by what the damage looks like to them
        damaged = "its table of contents"
    if damaged:
        raise DamagedError(path, f"is truncated or damaged ({damaged})", "train again, or copy it again")


def _check_numbers(path: Path, checkpoint: Checkpoint) -> None:
    """Raise UserError unless the step is a whole number and the losses are lists of numbers, as long as each other."""
    step, losses = checkpoint.step, checkpoint.losses
    if type(step) is not int or not 0 <= step < MOST:
        raise UserError(f"{path}: is damaged (step={step!r}: must be a whole number of at least 0); train again")
    if (
        not isinstance(losses, dict)
        or not all(type(name) is str and type(values) is list for name, values in losses.items())
        or not all(type(value) in (int, float) for values in losses.values() for value in values)
        or len({len(values) for values in losses.values()}) > 1
    ):
        raise UserError(f"{path}: is damaged (its losses are not lists of numbers, all as long); train again")


def _check_fit(path: Path, checkpoint: Checkpoint) -> None:
    """Raise UserError unless the state and the tokenizer are of the config's shape."""
    state = checkpoint.state
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"{path}: is damaged (its state is not a dict of tensors); train again")
    if not all(type(name) is str for name in state):
        raise UserError(f"{path}: is damaged (not all of its tensors have names); train again")
    try:
        wanted = weights_of(checkpoint.config, len(state))
    except UserError as error:
        raise UserError(f"{path}: does not fit its own config: {error}; train again") from error
    for name in sorted(wanted.keys() | state.keys()):
        expected, found = (describe_tensor(tensors.get(name)) for tensors in (wanted, state))
        if (expected := expected.removesuffix(" on meta")) != found:
            raise UserError(f"{path}: does not fit its own config: {name} is {found}, not {expected}; train again")
    _check_finite(path, state)
    tied = checkpoint.config.tied_head
    if tied and not torch.equal(state["lm_head.weight"], state["transformer.wte.weight"]):
        raise UserError(
            f"{path}: does not fit: lm_head.weight differs from wte.weight, to which it is tied; train again"
        )
    tokenizer = tokenizer_from_json(checkpoint.tokenizer)
    if not isinstance(tokenizer, NoTokenizer) and tokenizer.vocab_size > checkpoint.config.vocab_size:
        raise UserError(
            f"{path}: does not fit: its tokenizer has {tokenizer.vocab_size} ids, but "
            f"vocab_size={checkpoint.config.vocab_size}"
        )


def describe_tensor(found: Any) -> str:
    """Say what a thing is that should be a tensor on the CPU: its dtype and shape, and what else is not as usual.

    So two things with the same description can take each other's place.
    """
    if found is None:
        return "absent"
    if not isinstance(found, Tensor):
        return f"no tensor but {type(found).__name__}"
    if found.is_nested:
        return "a nested tensor"
    words = f"{str(found.dtype).removeprefix('torch.')} {list(found.shape)}"
    if found.layout != torch.strided:
        return f"{words} in {str(found.layout).removeprefix('torch.')}"
    return words + ("" if found.device.type == "cpu" else f" on {found.device}")


def _check_finite(path: Path, *trees: Any) -> None:
    """Raise DamagedError if a tensor in a checkpoint holds NaN or infinity."""
    if broken := _not_finite(*trees):
        raise DamagedError(path, f"{broken} holds NaN or infinity: training diverged", "use an earlier checkpoint")


def _not_finite(*trees: Any) -> str | None:
    """Return the name of the first tensor in dicts and lists that holds NaN or infinity; None if all are numbers."""
    tensors = (named for tree in trees for named in _tensors(tree))
    return next((name for name, tensor in tensors if not torch.isfinite(tensor).all()), None)


def _tensors(tree: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors with numbers that dicts and lists hold, named by the keys that lead to them."""
    waiting, seen = [("", tree)], set()
    while waiting:  # no recursion, and nothing twice: a file may nest them deeply, or hold a list that holds itself
        name, each = waiting.pop(0)
        if isinstance(each, Tensor):
            if each.layout == torch.strided and each.device.type == "cpu" and each.dtype in FLOATS:
                yield name, each
        elif isinstance(each, dict | list) and id(each) not in seen:
            seen.add(id(each))
            items = each.items() if isinstance(each, dict) else enumerate(each)
            waiting += [(f"{name}.{key}" if name else str(key), value) for key, value in items]
