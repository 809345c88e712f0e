"""The frontends: each is one file here, whose `read` gives a model's description and a function for its graph."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np

from export.artifact import ExportedModel
from export.signature import Signature
from gpt.cli import UserError
from gpt.config import GPTConfig
from tvm_frontend.artifact import RELAY
from tvm_frontend.graph import Graph

DEFAULT: Final = "onnx"
FRONTENDS = {
    "onnx": "this project's importer of ONNX: any B and T",
    "relax-onnx": "TVM's importer of ONNX: one B and T, chosen when compiling",
    "torch": "TVM's importer of torch.export's programs, from a checkpoint: any B and T",
}
_OF_EXPORTED = ("config", "tokenizer", "dtype", "form", "sha256", "checkpoint_sha256")


class CannotRun(UserError):
    """Tells that ONNX Runtime refuses a file, so that nothing can be compared with it."""


@dataclass(frozen=True)
class Source:
    """Describes a model that was read, and makes its graph.

    config, tokenizer, dtype, form, checkpoint_sha256: as `export.artifact.ExportedModel` has them; a file that is taken
    as it is, with its own inputs and outputs, is of the form `graph`, and its config is None unless it is a GPT-2.
    sha256: the hash of the file that was read. fixed_shape: the one [B, T] that the graph takes, or None for all.
    import_graph: makes the graph; it raises UserError for a node that it cannot read. run: computes the logits of ids
    int64 [B, T] by the file itself, without TVM, in the type run_dtype; of the form `graph` all outputs of all inputs,
    by name. import_plain: makes the graph for masks of ones and positions that count on, None where the file asks for
    neither. signature: how a file of the form `graph` is called.
    """

    config: GPTConfig | None
    tokenizer: dict[str, Any]
    dtype: str
    form: str
    sha256: str
    checkpoint_sha256: str
    import_graph: Callable[[], Graph]
    run: Callable[[Any], Any]
    run_dtype: str
    fixed_shape: tuple[int, int] | None = None
    import_plain: Callable[[], Graph] | None = None
    signature: Signature | None = None

    @classmethod
    def of(cls, exported: ExportedModel, import_graph: Callable[[], Graph], **rest: Any) -> "Source":
        """Make one of an ONNX file of ours; `rest` holds the fields that it lacks, or has with another value."""
        own = {name: getattr(exported, name) for name in _OF_EXPORTED}
        run: dict[str, Any] = {"run": partial(run_onnx, exported), "run_dtype": exported.dtype}
        return cls(import_graph=import_graph, **own | run | rest)


def read_source(
    frontend: str,
    model: Path,
    fixed_shape: tuple[int, int] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> Source:
    """Read a model's file by one of the FRONTENDS; raises UserError for another, and for a file that it cannot read.

    shapes: of some inputs of somebody else's file, for the frontend `onnx` alone.
    """
    if frontend not in FRONTENDS:
        raise UserError(f"frontend {frontend!r}: must be one of {', '.join((*FRONTENDS, RELAY))}")
    read = import_module(f"{__name__}.{frontend.replace('-', '_')}").read
    if shapes and frontend != DEFAULT:
        raise UserError(f"--shapes: not with --frontend {frontend}; drop one of the two")
    return read(model, fixed_shape, shapes) if shapes else read(model, fixed_shape)


def run_onnx(exported: ExportedModel, ids: np.ndarray) -> np.ndarray:
    """Compute logits float32 [B, T, V] (or [B, 1, V]) of ids int64 [B, T] by an ONNX file, over an empty cache."""
    sizes: dict[Any, int] = {"B": ids.shape[0], "T": ids.shape[1]}
    inputs = {
        name: np.zeros([sizes.get(size, size) for size in dims], ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        for name, (dtype, dims) in exported.entry_points[exported.form]["inputs"].items()
    }
    inputs[next(iter(inputs))] = ids.astype(np.int64)
    return np.asarray(run_file(exported.path, inputs)["logits"], np.float32)


def run_file(path: Path, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Compute all outputs of an ONNX file, by name, by ONNX Runtime, or by ONNX's evaluator where that is not there.

    Raises CannotRun if it cannot run the file.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        from onnx.reference import ReferenceEvaluator

        evaluator = ReferenceEvaluator(str(path))
        results: Any = evaluator.run(None, dict(inputs))
        return dict(zip(evaluator.output_names, map(np.asarray, results), strict=True))
    import onnxruntime
    from onnx import TensorProto
    from onnxruntime.capi import onnxruntime_pybind11_state as states

    def ort_value(array: np.ndarray) -> Any:
        array = np.ascontiguousarray(array)
        if array.dtype == ml_dtypes.bfloat16:  # which it does not know as numpy's
            kind = TensorProto.BFLOAT16
            return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), kind)
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of every graph with a cache that is not updated in place
    failures = (states.Fail, states.InvalidArgument, states.InvalidGraph, states.NotImplemented)
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_outputs()]
        results = session.run_with_ort_values(names, {name: ort_value(each) for name, each in inputs.items()})
    except (*failures, states.RuntimeException) as error:
        raise CannotRun(f"ONNX Runtime cannot run {path} ({' '.join(str(error).split())[:300]})") from error
    return {name: _array_of(result) for name, result in zip(names, results, strict=True)}


def _array_of(value: Any) -> np.ndarray:
    """Give a result of ONNX Runtime as an array."""
    if value.data_type() != "tensor(bfloat16)":  # which it does not turn into numpy's
        return value.numpy()
    import tvm

    return tvm.runtime.from_dlpack(value._ortvalue.to_dlpack()).numpy()


def refuse_fixed_shape(frontend: str, fixed_shape: tuple[int, int] | None) -> None:
    """Raise UserError where one shape is asked of a frontend that takes all."""
    if fixed_shape is not None:
        raise UserError(f"--batch and --tokens: not with --frontend {frontend}, which serves every B and T; drop them")
