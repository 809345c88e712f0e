"""Reads files of `export.onnx` by this project's own importer."""

from pathlib import Path

import onnx

from export.artifact import PRECISIONS, exported_from, read_onnx
from gpt.cli import UserError
from tvm_frontend.frontends import Source, refuse_fixed_shape
from tvm_frontend.frontends.onnx.importer import check_operators, import_onnx


def read(model: Path, fixed_shape: tuple[int, int] | None) -> Source:
    """Read an ONNX file of ours, every node of which the importer knows. Raises UserError for another."""
    refuse_fixed_shape("onnx", fixed_shape)
    file = read_onnx(model)
    proto = file.proto
    try:
        exported = exported_from(file)
    except UserError:
        check_operators(proto)  # for a file not made by us, the node that cannot be read says more
        raise
    if exported.form == "past":
        raise UserError(
            f"{model}: keeps its cache as past, which grows with each token; "
            "export with --with-cache for a preallocated one"
        )
    if exported.precision not in PRECISIONS:
        raise UserError(
            f"{model}: of {exported.precision}, and only files of {', '.join(PRECISIONS)} are compiled; compile one of "
            f"those with --precision {exported.precision}"
        )
    check_operators(proto)
    if exported.weights is not None:
        onnx.load_external_data_for_model(proto, str(exported.weights.parent))
    # Weights are float32 here, whatever the file rounds them to: see `tvm_frontend.frontends.onnx.importer`.
    return Source.of(exported, lambda: import_onnx(proto), dtype="float32")
