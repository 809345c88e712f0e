"""An export in fewer bits, by the tools of the engines that are made for them.

python -m export.quantize                              # artifacts/model.onnx to artifacts/model-int8.onnx
python -m export.quantize --tool openvino --bits 4     # to the folder artifacts/model-openvino-int4
python -m export.quantize artifacts/model-cache.onnx   # a form with a cache
"""

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is one line too
    from gpt.cli import run_main

    run_main("export.quantize")

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import numpy as np
import onnx
import onnxruntime
import tyro
from onnx import numpy_helper
from tabulate import tabulate

from export.artifact import ExportedModel, exported_from, load_exported, metadata_of, read_onnx, write_exported
from gpt.cli import UserError
from gpt.files import atomic_output, check_output, check_replaceable, find_input
from gpt.sealed import check_folder, read_folder, seal_folder

SEED = 0
XML, BIN, DESCRIPTION = "model.xml", "model.bin", "model.json"
ORIGIN = "quantized_from"  # the SHA-256 of the export
REMAKE = "python -m export.quantize"
LARGEST_GROUP = 128  # weights that share a scale in 4 bits, as NNCF by default
SMALLEST_GROUP = 16
Run = Callable[[dict[str, np.ndarray]], np.ndarray]  # inputs by name to logits float32 [B, T, V]


@dataclass(frozen=True)
class Loss:
    """Tells what fewer bits cost at one shape: the logits against the same export's in float32, on random ids.

    max_rel_err: the largest error over the largest |logit|. top1_match: share of positions with equal argmax.
    """

    B: int
    T: int
    max_rel_err: float
    top1_match: float


def quantize_onnxruntime(model: Path, output: Path) -> list[Loss]:
    """Write an export with the weights of its matrix products in int8; activations become uint8 while it runs.

    By ONNX Runtime's `quantize_dynamic`, one scale a matrix: its default, and of GPT-2's size faster for single tokens
    than a scale a column. A tied head gets a weight of its own. Raises UserError for a file that is not an export of
    ours in float32 with matrix products, and for an output that cannot be written.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    exported = _load_float32(model)
    check_output(output, *filter(None, (model, exported.weights)))
    with atomic_output(output) as part, TemporaryDirectory(dir=part.parent) as scratch, _quiet():
        folded = Path(scratch, "folded.onnx")
        _save_folded(model, folded)
        quantize_dynamic(folded, part, op_types_to_quantize=["MatMul"], weight_type=QuantType.QInt8)
        proto = onnx.load(part)
        onnx.helper.set_model_props(proto, _metadata(exported) | {ORIGIN: exported.sha256})
        write_exported(proto, part)
        losses = measure_loss(exported, _onnxruntime(part))
    return losses


def quantize_openvino(model: Path, output: Path, bits: int) -> list[Loss]:
    """Write a folder in OpenVINO's own format, model.xml and model.bin, with the weights in int8 or int4.

    By NNCF's `compress_weights`: int8 with a scale and an offset for each column, int4 with a scale for each group of
    up to 128, tables and head staying int8 there. OpenVINO's CPU plugin quantises activations as it sees fit. Raises
    UserError as `quantize_onnxruntime`, for a form that OpenVINO cannot read, and where NNCF is absent.
    """
    if missing := [name for name in ("nncf", "openvino") if find_spec(name) is None]:
        raise UserError(
            f"OpenVINO's quantisation is in the packages nncf and openvino: pip install {' '.join(missing)}"
        )
    check_replaceable(output, is_ours, "quantised model")
    exported = _load_float32(model)
    if exported.form == "cached":
        raise UserError(f"{model}: OpenVINO does not know its operators; export it with --cache past")
    with atomic_output(output, directory=True) as folder, _quiet():
        _compress(exported, folder, bits)
        losses = measure_loss(exported, _openvino(folder / XML))
        description = {ORIGIN: exported.sha256, "form": exported.form, "dtype": f"int{bits}"}
        seal_folder(folder, DESCRIPTION, description)
    return losses


def origin_of(path: Path) -> str:
    """Read the SHA-256 of the export that a quantised file or folder came from, once all of it was checked.

    Raises UserError for what is damaged or not a quantised export of ours.
    """
    if path.is_dir():
        found = check_folder(path, DESCRIPTION, REMAKE).get(ORIGIN)
    else:
        file = read_onnx(path)
        exported_from(file)
        found = {prop.key: prop.value for prop in file.proto.metadata_props}.get(ORIGIN)
    if found is None:
        raise UserError(f"{path}: not a quantised export of ours; make one with {REMAKE}")
    return found


def read_openvino(folder: Path) -> tuple[bytes, bytes]:
    """Read model.xml and model.bin of a folder: the very bytes that were checked. Raises UserError as `origin_of`."""
    files = read_folder(folder, DESCRIPTION, REMAKE)[1]
    return files[XML], files[BIN]


def is_ours(folder: Path) -> bool:
    """Return whether a folder holds nothing but a quantised model, so that a new one may replace it."""
    return folder.is_dir() and {file.name for file in folder.iterdir()} <= {XML, BIN, DESCRIPTION}


def measure_loss(exported: ExportedModel, run: Run) -> list[Loss]:
    """Compare with the float32 export in ONNX Runtime at one token, an odd number and the longest prompt.

    Raises RuntimeError where an error is as large as the logits, or not a number.
    """
    right, random, losses = _onnxruntime(exported.path), np.random.default_rng(SEED), []
    block_size = exported.config.block_size
    for B, T in ((1, 1), (3, min(17, block_size)), (1, block_size)):
        inputs = _inputs(exported, random.integers(0, exported.config.vocab_size, (B, T)))
        expected, logits = right(inputs), run(inputs)
        error = float(np.abs(logits - expected).max() / np.abs(expected).max())
        if not error < 1:
            raise RuntimeError(f"{exported.path}: quantised, its logits at B={B}, T={T} are off by {error:.2g} of them")
        losses.append(Loss(B, T, error, float((logits.argmax(-1) == expected.argmax(-1)).mean())))
    return losses


def _load_float32(model: Path) -> ExportedModel:
    exported = load_exported(model)
    if exported.dtype != "float32":
        raise UserError(f"{model}: is in {exported.dtype}; quantise an export in fp32")
    if exported.config.model == "bigram":
        raise UserError(f"{model}: a bigram has no matrix products whose weights could have fewer bits")
    return exported


def _save_folded(model: Path, folded: Path) -> None:
    """Store each transposed weight as the product wants it: behind a Transpose it would stay float32."""
    proto = onnx.load(model)
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    nodes = []
    for node in proto.graph.node:
        if node.op_type == "Transpose" and node.input[0] in weights:
            [perm] = (attribute.ints for attribute in node.attribute)
            array = numpy_helper.to_array(weights[node.input[0]]).transpose(perm)
            proto.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), node.output[0]))
        else:
            nodes.append(node)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in proto.graph.initializer if tensor.name in used]
    for field, values in (("node", nodes), ("initializer", kept)):
        proto.graph.ClearField(field)
        getattr(proto.graph, field).extend(values)
    onnx.save(proto, folded, save_as_external_data=True, location=f"{folded.name}.data")  # no limit of 2 GB


def _metadata(exported: ExportedModel) -> dict[str, str]:
    return metadata_of(
        config=exported.config,
        tokenizer=exported.tokenizer,
        entry_points=exported.entry_points,
        dtype="int8",
        exporter=f"{exported.exporter}; quantize_dynamic, onnxruntime {onnxruntime.__version__}",
        checkpoint_sha256=exported.checkpoint_sha256,
    )


def _compress(exported: ExportedModel, folder: Path, bits: int) -> None:
    import nncf
    import openvino
    from openvino.passes import ConstantFolding, Manager

    if bits == 8:
        settings: dict[str, Any] = {"mode": nncf.CompressWeightsMode.INT8_ASYM}
    else:
        settings = {"mode": nncf.CompressWeightsMode.INT4_SYM, "group_size": _group_size(exported)}
    core = openvino.Core()
    model = core.read_model(exported.path)
    folding = Manager()
    folding.register_pass(ConstantFolding())  # NNCF does not see a weight behind a Transpose
    folding.run_passes(model)
    with TemporaryDirectory(dir=folder.parent) as scratch:
        # Read back from its own format, without what is left of the ONNX graph, at which NNCF stumbles.
        openvino.save_model(model, Path(scratch, XML), compress_to_fp16=False)
        compressed = nncf.compress_weights(core.read_model(Path(scratch, XML)), **settings)
    openvino.save_model(compressed, folder / XML, compress_to_fp16=False)


def _group_size(exported: ExportedModel) -> int:
    """Return the largest power of two up to 128 that divides the width, and so the longest row of every product."""
    size = LARGEST_GROUP
    while exported.config.n_embd % size:
        size //= 2
    if size < SMALLEST_GROUP:
        raise UserError(
            f"{exported.path}: 4 bits need a width that {SMALLEST_GROUP} divides, not {exported.config.n_embd}"
        )
    return size


def _inputs(exported: ExportedModel, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Return what a form takes for a prompt: the ids and, if it has a cache, an empty one."""
    sizes = {"B": ids.shape[0], "T": ids.shape[1], "P": 0}
    inputs = {
        name: np.zeros([sizes.get(dim, dim) for dim in dims], dtype)
        for name, (dtype, dims) in exported.entry_points[exported.form]["inputs"].items()
    }
    return inputs | {next(iter(inputs)): ids}


def _onnxruntime(path: Path) -> Run:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(["logits"], inputs)[0]


def _openvino(path: Path) -> Run:
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda inputs: compiled(inputs)["logits"]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the tools' advice, tables and progress bars."""
    names = ("nncf", None)  # ONNX Runtime's tool speaks by the root logger
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def quantize_command(
    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="ONNX")] = Path("artifacts/model.onnx"),
    output: Annotated[
        Path | None,
        tyro.conf.arg(
            aliases=["-o"],
            metavar="PATH",
            help_behavior_hint="(default: model-int8.onnx, model-openvino-int8, … beside the model)",
        ),
    ] = None,
    tool: Literal["onnxruntime", "openvino"] = "onnxruntime",
    bits: Literal[8, 4] = 8,
) -> None:
    """Quantise an export by an engine's own tool, and show what the fewer bits cost.

    Args:
        model: a file written by python -m export.onnx in fp32, of any form
        output: the file (ONNX Runtime) or folder (OpenVINO) to write
        tool: whose: onnxruntime (weights and activations in 8 bits) or openvino (weights in 8 or 4)
        bits: of a weight
    """
    model = find_input(model)
    if tool == "onnxruntime":
        if bits != 8:
            raise UserError("bits=4: ONNX Runtime's dynamic quantisation has 8 only; take --tool openvino")
        output = output or model.with_name(f"{model.stem}-int8.onnx")
        losses = quantize_onnxruntime(model, output)
    else:
        output = output or model.with_name(f"{model.stem}-openvino-int{bits}")
        losses = quantize_openvino(model, output, bits)
    print(f"int{bits} against float32, random ids:")
    rows = [(loss.B, loss.T, f"{loss.max_rel_err:.1e}", f"{loss.top1_match:.1%}") for loss in losses]
    heads, alignment = ("B", "T", "error / largest logit", "top-1 equal"), ["right"] * 4
    print(tabulate(rows, heads, "plain", colalign=alignment, disable_numparse=True))
    files = output.iterdir() if output.is_dir() else [output]
    print(f"wrote {output} ({sum(file.stat().st_size for file in files) / 1e6:.1f} MB)")


def main() -> None:
    """Parse the command line and quantise."""
    tyro.cli(quantize_command, prog="python -m export.quantize")
