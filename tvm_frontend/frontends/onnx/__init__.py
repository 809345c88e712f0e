"""Reads ONNX files by this project's own importer: its own exports, and what others wrote, as it is."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import onnx
from onnx import inliner

from export.artifact import PRECISIONS, PREFIX, ExportedModel, OnnxFile, exported_from, read_onnx
from export.foreign import check_numbers, check_readable, sha256_onnx
from export.graph import GraphReader
from export.interface import plain_form, signature_of, with_shapes
from export.storage import read_weights
from gpt.cli import UserError
from gpt.config import GPTConfig
from gpt.tokenizer import NoTokenizer
from tvm_frontend.frontends import Source, refuse_fixed_shape, run_file
from tvm_frontend.frontends.onnx.importer import check_operators, import_onnx

FORMS = ("forward", "cached")  # of exports of this project, which a session of their own kind runs


def read(model: Path, fixed_shape: tuple[int, int] | None, shapes: Mapping[str, Sequence[int]] | None = None) -> Source:
    """Read an ONNX file, every node of which the importer knows. Raises UserError for another.

    shapes: the shapes of some inputs of a file that others wrote, for which alone it is compiled.
    """
    refuse_fixed_shape("onnx", fixed_shape)
    file = read_onnx(model)
    ours = any(prop.key.startswith(PREFIX) for prop in file.proto.metadata_props)
    exported = exported_from(file) if ours else None
    if exported is None or exported.form not in FORMS or exported.precision not in PRECISIONS:
        return _read_as_it_is(file, exported, shapes or {})
    if shapes:
        raise UserError("--shapes: not with an export of this project, which serves every B and T; drop it")
    proto = file.proto
    check_operators(proto)
    if exported.weights is not None:
        onnx.load_external_data_for_model(proto, str(exported.weights.parent))
    # Weights are float32 here, whatever the file rounds them to: see `tvm_frontend.frontends.onnx.importer`.
    return Source.of(exported, lambda: import_onnx(proto), dtype="float32")


def _read_as_it_is(file: OnnxFile, exported: ExportedModel | None, shapes: Mapping[str, Sequence[int]]) -> Source:
    """Read a file with its own inputs and outputs."""
    proto, sha256 = file.proto, sha256_onnx(file)
    if proto.functions:
        proto = inliner.inline_local_functions(proto)
    read_weights(proto, file.path)
    check_readable(proto, file.path)
    check_numbers(proto, file.path)
    if shapes:
        with_shapes(proto, shapes)
    check_operators(proto)
    signature = signature_of(proto)
    plain = plain_form(proto, signature)
    import_graph = partial(import_onnx, proto, keep_types=True)
    import_plain = partial(import_onnx, plain, keep_types=True) if plain else None
    return Source(
        config=exported.config if exported else _config_of(proto),
        tokenizer=exported.tokenizer if exported else NoTokenizer().to_json(),
        dtype="float32",
        form="graph",
        sha256=sha256,
        checkpoint_sha256=exported.checkpoint_sha256 if exported else sha256,
        import_graph=import_graph,
        import_plain=import_plain,
        run=partial(run_file, file.path),
        run_dtype=_computes_in(proto),
        signature=signature,
    )


def _config_of(proto: onnx.ModelProto) -> GPTConfig | None:
    """Return the shape of the GPT-2 that a file is, None if it is another model."""
    try:
        return GraphReader(proto).config()
    except UserError:
        return None


def _computes_in(proto: onnx.ModelProto) -> str:
    """Return the floating type that most weights of a file have."""
    numbers: dict[str, int] = {}
    for tensor in GraphReader(proto).constants.values():
        dtype = str(onnx.helper.tensor_dtype_to_np_dtype(tensor.dtype))
        if dtype in PRECISIONS.values():
            numbers[dtype] = numbers.get(dtype, 0) + tensor.numbers
    return max(numbers, key=lambda dtype: numbers[dtype], default="float32")
