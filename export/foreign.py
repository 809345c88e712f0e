"""Find out whether ONNX files that others wrote can be used by the project, and if so, bring them to our form."""

import hashlib
from collections.abc import MutableSequence, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import ValueInfoProto
from onnx_ir.passes.common import IdentityEliminationPass, InlinePass, NameFixPass, RemoveUnusedNodesPass
from onnxruntime.capi.onnxruntime_pybind11_state import (
    Fail,
    InvalidArgument,
    InvalidGraph,
    RuntimeException,
)
from onnxruntime.capi.onnxruntime_pybind11_state import (
    NotImplemented as NotSupported,
)

from export import storage
from export.artifact import ExportedModel, OnnxFile, load_exported, metadata_of, read_proto, write_exported
from export.graph import FLOATS, MASK, POSITIONS, GraphReader, dims_of, dtype_of, opsets_of, without_weights
from export.masks import say_causal
from export.signature import Signature
from gpt.cli import UserError
from gpt.config import GPTConfig
from gpt.files import atomic_output, hold_output, sha256_file
from gpt.tokenizer import NoTokenizer

CACHES = ("past_key_values", "past_key", "past_value", "past", "cache")
WEIGHTS = "weights"  # the file beside the graph that holds them until both are settled
LARGE_BYTES = 1024  # the least size of a tensor that goes into a second file, if there is one


@dataclass(frozen=True)
class Usable:
    """A forward pass that can be brought to our form.

    ids, logits: the names of the input and the output. filled: inputs that are made from the ids: a mask of ones,
    positions that count up. config: of the GPT-2 that it holds.
    """

    ids: str
    logits: str
    filled: tuple[str, ...]
    config: GPTConfig


@dataclass(frozen=True)
class Foreign:
    """Says what a file can be used as.

    form: forward, past or cached, by its inputs. config: of the GPT-2 that it holds, or None. missing: what stands in
    the way of using it, one line each; nothing if it can be used. usable: how it can be, None if anything is missing.
    """

    form: str
    config: GPTConfig | None
    missing: tuple[str, ...]
    usable: Usable | None


def examine(proto: onnx.ModelProto) -> Foreign:
    """Find out what a parsed file can be used as; its external data need not be loaded."""
    reader = GraphReader(proto)
    caches = [value.name for value in reader.inputs if value.name.startswith(CACHES)]
    given = [value for value in reader.inputs if value.name not in caches]
    ids, logits = reader.ids, reader.logits
    filled = tuple(value.name for value in given if value.name in (MASK, POSITIONS) and value is not ids)
    form = "forward" if not caches else "cached" if any(value.name == "pos" for value in given) else "past"
    missing = list(_faults_of_operators(proto, reader))
    if caches:
        missing.append(
            f"inputs {caches[0]}, …: it takes a KV cache, and of others' files only the plain forward pass is used; "
            "export it with use_cache=False"
        )
    for value in given:
        if value is not ids and value.name not in filled:
            missing.append(f"input {value.name}: nothing to fill it with; export the model with token ids alone")
    missing += _faults_of_ids(ids) if ids else ["no input of token ids, an int64 [B, T]"]
    missing += _faults_of_logits(logits) if logits else ["no output of logits, a float32 [B, T, V]"]
    config = None
    try:
        config = reader.config()
    except UserError as error:
        missing.append(f"not a GPT-2 that could be recognised: {error}")
    usable = None
    if not missing and ids and logits and config:
        usable = Usable(ids.name, logits.name, filled, config)
    return Foreign(form, config, tuple(missing), usable)


def adopt(source: Path, output: Path) -> ExportedModel:
    """Write somebody's forward pass as a file of ours: `ids` to `logits`, with metadata; its nodes stay as they are.

    But a causal mask that it computes becomes an attribute of Attention (see `export.masks`). Other outputs are dropped
    with the nodes that only they need; a mask or positions that it asks for are made from the ids. Its hash stands
    where a checkpoint's would. Before the file gets its name, ONNX Runtime gives the same logits for both. Raises
    UserError for a file that cannot be used, saying why; RuntimeError if the logits differ.
    """
    whole = read_proto(source)
    found = examine(whole)
    if found.usable is None:
        more = f" (and {len(found.missing) - 1} more: python -m export.inspect {source})" if found.missing[1:] else ""
        raise UserError(f"{source}: {found.missing[0]}{more}")
    storage.read_weights(whole, source)
    check_readable(whole, source)
    check_numbers(whole, source)
    fits = GraphReader(whole).parameter_bytes <= storage.INLINE_BYTES
    theirs = whole.SerializeToString() if fits else str(source)  # before its parts get other names
    producer = f"{whole.producer_name or 'unknown'} {whole.producer_version}".strip()
    model = ir.from_proto(whole)
    _bring_to_our_form(model, found.usable)
    with hold_output(output):
        with storage.removed_if_failed(output), atomic_output(output) as part:
            ir.external_data.unload_from_model(model, part.parent, WEIGHTS, size_threshold_bytes=LARGE_BYTES)
            proto = ir.to_proto(model)
            weights = storage.settle_weights(proto, part.with_name(WEIGHTS), part)
            metadata = _metadata(found.usable.config, producer, sha256_file(source), weights)
            onnx.helper.set_model_props(proto, metadata)
            write_exported(proto, part)
            _prove(source, theirs, part, found.usable)
            storage.place_weights(weights, output)
        storage.remove_other_weights(weights, output)
    return load_exported(output)


def _faults_of_operators(proto: onnx.ModelProto, reader: GraphReader) -> list[str]:
    faults = []
    local = {function.domain for function in proto.functions}
    for name in reader.node_counts:
        domain, _, operator = name.rpartition(".")
        if domain and domain not in local:
            faults.append(
                f"operator {operator} of domain {domain}: not of ONNX itself, so only some engines know it; export "
                "again without that optimisation"
            )
        elif operator in ("If", "Loop", "Scan"):
            faults.append(f"operator {operator}: control flow is not supported; export a plain forward pass")
    if "ai.onnx" not in opsets_of(proto):
        faults.append("it names no opset of ONNX itself")
    return faults


def _faults_of_ids(ids: ValueInfoProto) -> list[str]:
    dtype, dims = dtype_of(ids), dims_of(ids)
    if dtype != "int64" or len(dims) != 2:
        return [f"input {ids.name}: is {dtype} {dims}, must be int64 [B, T]"]
    if fixed := [dim for dim in dims if isinstance(dim, int)]:
        return [f"input {ids.name}: its shape {dims} fixes {fixed[0]}; export it with dynamic B and T"]
    return []


def _faults_of_logits(logits: ValueInfoProto) -> list[str]:
    dtype, dims = dtype_of(logits), dims_of(logits)
    if dtype != "float32":
        return [f"output {logits.name}: is {dtype}, must be float32"]
    return [f"output {logits.name}: its shape {dims} must be [B, T, V]"] if dims and len(dims) != 3 else []


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
    """Raise UserError for a model that is no valid ONNX, or that has control flow.

    Operators of domains other than ONNX's own are for its reader to know, and so are those that ONNX Runtime writes in
    ONNX's domain although ONNX has none of that name.
    """
    if "ai.onnx" not in opsets_of(proto):
        raise UserError(f"{source}: names no opset of ONNX itself; export it again")
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


def _bring_to_our_form(model: ir.Model, found: Usable) -> None:
    """Leave in a model what computes `logits` [B, T, V] from `ids` [B, T]; functions are inlined, causal masks said.

    The shapes in between are forgotten, as they have other names.
    """
    InlinePass()(model)
    graph = model.graph
    ids = next(value for value in graph.inputs if value.name == found.ids)
    logits = next(value for value in graph.outputs if value.name == found.logits)
    _replace(graph.outputs, [logits])
    _fill(graph, ids, found.filled)
    _replace(graph.inputs, [ids])
    for value in (value for node in graph for value in node.outputs if value is not logits):
        value.shape = value.type = None
    ids.name, ids.shape = "ids", ir.Shape(["B", "T"])
    logits.name, logits.shape = "logits", ir.Shape(["B", "T", found.config.vocab_size])
    IdentityEliminationPass()(model)
    NameFixPass()(model)  # whatever else had one of these names gets another
    say_causal(graph)
    RemoveUnusedNodesPass()(model)


def _replace(values: MutableSequence[ir.Value], others: list[ir.Value]) -> None:
    values.clear()
    values.extend(others)


def _fill(graph: ir.Graph, ids: ir.Value, filled: tuple[str, ...]) -> None:
    """Make what a caller would have to give besides the ids: a mask of ones, positions 0 … T - 1, both int64 [B, T]."""
    made = ir.tape.Tape()
    for value in [value for value in graph.inputs if value.name in filled]:
        shape = made.op("Shape", [ids])
        if value.name == MASK:
            new = made.op("ConstantOfShape", [shape], {"value": ir.tensor([1])})
        else:
            first, step = (made.initializer(ir.tensor(number), f"filled.{number}") for number in (0, 1))
            T = made.op("Squeeze", [made.op("Shape", [ids], {"start": 1, "end": 2})])
            new = made.op("Expand", [made.op("Range", [first, T, step]), shape])
        value.replace_all_uses_with(new)
    for constant in made.initializers:
        graph.register_initializer(constant)
    graph.insert_before(graph[0], made.nodes)


def _metadata(config: GPTConfig, producer: str, sha256: str, weights: Path | None) -> dict[str, str]:
    return metadata_of(
        config=config,
        tokenizer=NoTokenizer().to_json(),
        entry_points={
            "forward": {
                "inputs": {"ids": ["int64", ["B", "T"]]},
                "outputs": {"logits": ["float32", ["B", "T", config.vocab_size]]},
            }
        },
        dtype="float32",
        exporter=f"{producer}, adopted",
        checkpoint_sha256=sha256,
        weights=weights,
    )


def _prove(source: Path, model: bytes | str, adopted: Path, found: Usable) -> None:
    """Run both files in ONNX Runtime at two shapes. Raises UserError if it refuses, RuntimeError if they differ.

    model: what was read from `source`, or its path.
    """
    try:
        theirs, ours = (
            onnxruntime.InferenceSession(each, providers=["CPUExecutionProvider"]) for each in (model, str(adopted))
        )
        for B, T in ((1, 1), (2, min(7, found.config.block_size))):
            ids = np.random.default_rng(T).integers(0, found.config.vocab_size, (B, T))
            given = {MASK: np.ones_like(ids), POSITIONS: np.broadcast_to(np.arange(T), (B, T))}
            given = {name: given[name] for name in found.filled}
            (expected,) = theirs.run([found.logits], {found.ids: ids, **given})
            (logits,) = ours.run(["logits"], {"ids": ids})
            if not np.isfinite(expected).all():
                raise UserError(f"{source}: its logits are NaN or infinite in ONNX Runtime; export a sound model")
            scale = max(1.0, float(np.abs(expected).max()))
            if expected.shape != (B, T, found.config.vocab_size) or not np.abs(logits - expected).max() <= 1e-4 * scale:
                raise RuntimeError(f"{source}: brought to our form it gives other logits at B={B}, T={T}")
    except (Fail, InvalidArgument, InvalidGraph, NotSupported, RuntimeException) as error:
        line = " ".join(str(error).split())[:300]
        raise UserError(f"{source}: ONNX Runtime cannot run it ({line}); export it again") from error
