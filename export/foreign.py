"""Find out whether an ONNX file that somebody else wrote can be used, as it is, and say why if not."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx

from export import storage
from export.artifact import OnnxFile
from export.graph import FLOATS, GraphReader, opsets_of, without_weights
from export.signature import Signature
from gpt.cli import UserError
from gpt.files import sha256_file


def check_callable(signature: Signature) -> None:
    """Raise UserError, saying why, unless a model gives logits [B, T, V] for token ids [B, T] and what follows of them.

    Logits [B, 1, V] of the last position are as good.
    """
    if signature.ids is None:
        raise UserError("no input of token ids, of whole numbers [B, T], could be told among its inputs")
    if signature.logits is None:
        raise UserError("no output of logits, of floating numbers [B, T, V], could be told among its outputs")
    ids = signature.input(signature.ids)
    logits = next(port for port in signature.outputs if port.name == signature.logits)
    if len(ids.dims) != 2:
        raise UserError(f"input {ids.name} is [{_listed(ids.dims)}]: must be [B, T]")
    if len(logits.dims) not in (0, 3):
        raise UserError(f"output {logits.name} is [{_listed(logits.dims)}]: must be [B, T, V]")
    if tokens_of(signature) is None:
        raise UserError("nothing says how many token ids it knows: no table that they look up, and no size of logits")
    signature.feed(np.zeros([dim if isinstance(dim, int) else 1 for dim in ids.dims], np.int64))


def tokens_of(signature: Signature) -> int | None:
    """Return how many token ids a model knows: the rows of the table that they look up, or else its logits."""
    sizes = [port.dims[-1] for port in signature.outputs if port.name == signature.logits and port.dims]
    return signature.vocab_size or next((size for size in sizes if isinstance(size, int)), None)


def goes_on(signature: Signature) -> bool:
    """Tell whether a model can go on from keys and values of earlier tokens by any number of tokens.

    Not if it gives the last position's logits alone, as then what it makes of several tokens cannot be seen.
    """
    if not signature.past or signature.ids is None:
        return False
    T = signature.input(signature.ids).dims[1]
    logits = next(port.dims for port in signature.outputs if port.name == signature.logits)
    return not isinstance(T, int) and not (logits and logits[1] == 1)


def _listed(dims: Sequence[int | str]) -> str:
    return ", ".join(map(str, dims))


def check_readable(proto: onnx.ModelProto, source: Path) -> None:
    """Raise UserError for a model that is no valid ONNX.

    Operators of domains other than ONNX's own are for its reader to know, and so are those that ONNX Runtime writes in
    ONNX's domain although ONNX has none of that name.
    """
    if "ai.onnx" not in opsets_of(proto):
        raise UserError(f"{source}: names no opset of ONNX itself; export it again")
    newest = onnx.defs.onnx_opset_version()
    if (opset := opsets_of(proto)["ai.onnx"]) > newest:
        raise UserError(f"{source}: opset {opset}, and ONNX has none above {newest}; export it with one of those")
    if not proto.graph.output:
        raise UserError(f"{source}: gives no output; export it again")
    try:
        onnx.checker.check_model(without_weights(proto))
    except (onnx.checker.ValidationError, RuntimeError, ValueError) as error:
        line = " ".join(str(error).split())[:300]
        if "No Op registered for" not in line:
            raise UserError(f"{source}: ONNX's checker refuses it ({line}); export it again") from error


def sha256_onnx(file: OnnxFile) -> str:
    """Return the SHA-256 of an ONNX file, and of the files beside it that hold its weights, if there are any."""
    others = {storage.place_of(tensor, file.path)[0] for tensor in storage.external_tensors(file.proto)}
    found = hashlib.sha256(file.content)
    if not others:
        return found.hexdigest()
    for name in sorted(others):
        try:
            found.update(sha256_file(file.path.parent / name).encode())
        except OSError as error:
            raise UserError(f"{file.path}: its weights in {name} cannot be read: {error.strerror}") from error
    return found.hexdigest()


def check_numbers(proto: onnx.ModelProto, source: Path) -> None:
    """Raise UserError for a weight of another size than its shape, one that holds NaN, and for an infinite matrix.

    A mask that is added to scores may hold infinities.
    """
    matrices = GraphReader(proto).matrices
    for tensor in proto.graph.initializer:
        try:
            values = onnx.numpy_helper.to_array(tensor)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{source}: weight {tensor.name!r} does not fit its shape; export it again") from error
        if tensor.data_type not in FLOATS:
            continue
        values = values.astype(np.float32) if values.dtype.kind != "f" else values  # bfloat16
        if np.isnan(values).any() or (tensor.name in matrices and not np.isfinite(values).all()):
            raise UserError(f"{source}: weight {tensor.name!r} holds NaN or infinity; export a model that is sound")
