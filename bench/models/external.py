"""Lets an external ONNX file, written by other tools, take part: its reference, and the engines that can run it."""

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bench.backends import Candidate
from bench.correctness.agreement import Errors, measure_allowed
from bench.correctness.rounding import Rounding
from bench.models.artifacts import (
    COMPILED_LOW,
    COMPILED_O0,
    COMPILED_O3,
    COMPILED_RELAY,
    EXPORTED,
    EXPORTED_INT8,
    OPENVINO,
    Artifacts,
)
from gpt.cli import UserError
from gpt.config import GPTConfig
from gpt.files import sha256_file

if TYPE_CHECKING:
    import onnx
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import OpRun

EXTERNAL_PHASES = ("prefill",)  # phases of a file without a KV cache
NEEDS = "needs the model's checkpoint, and an ONNX file is all there is"
# Files that can be built from an ONNX file without its checkpoint.
EXTERNAL_FILES = (
    EXPORTED,
    COMPILED_O0,
    COMPILED_O3,
    *(COMPILED_RELAY.format(level) for level in (0, 3)),
    *(COMPILED_LOW[0].format(precision) for precision in ("bf16", "int8", "int4")),
    EXPORTED_INT8,
    *(OPENVINO.format(bits) for bits in (8, 4)),
)


def adopt_external(source: Path, folder: Path) -> tuple[Artifacts, str]:
    """Convert an external file to this project's form in a subfolder; return its artifacts and a description of it.

    Raises UserError with the reason for a file that cannot be used.
    """
    from export.artifact import load_exported
    from export.foreign import adopt

    artifacts = Artifacts(folder / f"onnx-{source.stem}", onnx=source)
    try:
        known = source.is_file() and load_exported(artifacts.exported).checkpoint_sha256 == sha256_file(source)
    except UserError:  # there is none, or it is damaged: it is made again
        known = False
    if not known:
        print(f"bringing {source} to this project's form: {artifacts.exported}", file=sys.stderr, flush=True)
        adopt(source, artifacts.exported)
    return artifacts, f"the model in {source}"


def is_external(artifacts: Artifacts) -> bool:
    """Return True if the folder holds a converted external ONNX file and no checkpoint."""
    return artifacts.exported.exists() and not artifacts.checkpoint.exists()


def checked_phases(asked: Iterable[str]) -> tuple[str, ...]:
    """Return the phases to compare. Raises UserError for one that needs a KV cache."""
    if wrong := [name for name in asked if name not in EXTERNAL_PHASES]:
        raise UserError(
            f"phase {wrong[0]!r}: must be {', '.join(EXTERNAL_PHASES)} with an ONNX file, which has no KV cache here"
        )
    return EXTERNAL_PHASES


def without_checkpoint(candidate: Candidate) -> Candidate:
    """Restrict a candidate to the phases that need no checkpoint; it is absent if none is left."""
    files = tuple((phase, file) for phase, file in candidate.files if file in EXTERNAL_FILES)
    return replace(candidate, files=files) if files else replace(candidate, absent=NEEDS)


class Reference:
    """Runs the graph of a folder's ONNX file in float64 by ONNX's reference evaluator. It is never timed."""

    summary = "ONNX's reference evaluator in float64"

    def load(self, artifacts: Artifacts, config: GPTConfig, threads: int, variant: str) -> None:
        """Load the model; numpy reads the number of threads from the environment."""
        import onnx

        from export.artifact import exported_from, read_onnx

        file = read_onnx(artifacts.exported)
        if weights := exported_from(file).weights:
            onnx.load_external_data_for_model(file.proto, str(weights.parent))
        self._proto, self._config = file.proto, config
        self._wide = in_float64(self._proto)
        self._evaluators: dict[Rounding | None, ReferenceEvaluator] = {}

    def logits(self, ids: np.ndarray, rounding: Rounding | None = None) -> np.ndarray:
        """Compute logits float64 [B, T, V] of ids int64 [B, T], by the graph with its weights rounded, if they are."""
        return _run(self._judge(rounding), ids)

    def allowed(self, precision: str, rounding: Rounding | None, seed: int) -> Errors:
        """Measure the errors that an engine of a precision may have; see `measure_allowed`."""
        judge = self._judge(rounding)
        if rounding is not None:
            measure = evaluator_of(self._wide, self._products(rounding, while_running=True))
        else:
            measure = evaluator_of(self._proto, () if precision == "fp32" else _narrow_products(precision))
        return measure_allowed(partial(_run, judge), partial(_run, measure), self._config, seed)

    def _judge(self, rounding: Rounding | None) -> "ReferenceEvaluator":
        if rounding not in self._evaluators:
            self._evaluators[rounding] = evaluator_of(self._wide, self._products(rounding))
        return self._evaluators[rounding]

    def _products(self, rounding: Rounding | None, *, while_running: bool = False) -> "Sequence[type[OpRun]]":
        if rounding is None:
            return ()
        products = [node for node in self._proto.graph.node if node.op_type in ("MatMul", "Gemm")]
        return _rounding_products(rounding, self._config.n_embd, products[-1].output[0], while_running)


def _run(evaluator: "ReferenceEvaluator", ids: np.ndarray) -> np.ndarray:
    results = evaluator.run(["logits"], {"ids": ids})
    assert isinstance(results, list)  # it is a dict only where intermediate results are asked for
    return results[0]


def _rounding_products(rounding: Rounding, width: int, head: str, while_running: bool) -> "list[type[OpRun]]":
    """Define products and tables that round their weights, and while_running what the weights are multiplied with.

    A weight has two dimensions: the products of attention have three or four. head: the name of the last result.
    """
    from onnx.reference.op_run import OpRun

    def product_of(x: np.ndarray, weight: np.ndarray, name: str) -> np.ndarray:
        if weight.ndim != 2:
            return np.matmul(x, weight)
        by = (rounding.head if name == head else None) or rounding.weights
        weight = by(np.ascontiguousarray(weight.T), width).T
        return np.matmul(rounding.activations(x) if while_running else x, weight)

    class Gather(OpRun):
        def _run(self, data: np.ndarray, indices: np.ndarray, axis: int = 0) -> tuple[np.ndarray]:
            if rounding.tables and data.ndim == 2 and data.dtype.kind == "f":
                data = rounding.tables(data, width)
            return (np.take(data, indices, axis=axis),)

    return [*_products_by(product_of), Gather]


def _narrow_products(precision: str) -> "list[type[OpRun]]":
    """Define products and sums whose inputs and results have the bits of bfloat16 or float16, held in float32."""
    import ml_dtypes
    from onnx.reference.op_run import OpRun

    dtype = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16}[precision]

    def narrow(x: np.ndarray) -> np.ndarray:
        return x.astype(dtype).astype(x.dtype)

    class Add(OpRun):
        def _run(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray]:
            return (narrow(a + b) if a.dtype.kind == "f" else a + b,)

    return [*_products_by(lambda x, weight, name: narrow(np.matmul(narrow(x), narrow(weight)))), Add]


def _products_by(product_of: Callable[[np.ndarray, np.ndarray, str], np.ndarray]) -> "list[type[OpRun]]":
    """Define MatMul and Gemm by a function of both factors and the name of the result."""
    from onnx.reference.op_run import OpRun

    class MatMul(OpRun):
        def _run(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray]:
            return (product_of(a, b, self.onnx_node.output[0]),)

    class Gemm(OpRun):
        def _run(
            self,
            a: np.ndarray,
            b: np.ndarray,
            c: np.ndarray | None = None,
            alpha: float = 1.0,
            beta: float = 1.0,
            transA: int = 0,
            transB: int = 0,
        ) -> tuple[np.ndarray]:
            product = alpha * product_of(a.T if transA else a, b.T if transB else b, self.onnx_node.output[0])
            return (product if c is None else product + beta * c,)

    return [MatMul, Gemm]


def evaluator_of(proto: "onnx.ModelProto", ops: "Iterable[type[OpRun]]" = ()) -> "ReferenceEvaluator":
    """Build ONNX's reference evaluator with Erf and Gelu that compute in the precision of their input.

    Its own Erf rounds to float32, and its Gelu is a function with float32 constants. ops: take the place of its own.
    """
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import OpRun

    class Erf(OpRun):
        def _run(self, x: np.ndarray) -> tuple[np.ndarray]:
            return (_erf(x).astype(x.dtype),)

    class Gelu(OpRun):
        def _run(self, x: np.ndarray, approximate: str = "none") -> tuple[np.ndarray]:
            inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
            share = np.tanh(inner) if approximate == "tanh" else _erf(x / math.sqrt(2))
            return ((0.5 * x * (1 + share)).astype(x.dtype),)

    return ReferenceEvaluator(proto, new_ops=[Erf, Gelu, *ops])


def in_float64(proto: "onnx.ModelProto") -> "onnx.ModelProto":
    """Copy a graph with every float16, bfloat16 and float32 tensor, attribute and cast widened to float64."""
    import onnx

    low = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
    wide = onnx.ModelProto()
    wide.CopyFrom(proto)
    graph = wide.graph
    for tensor in graph.initializer:
        if tensor.data_type in low:
            tensor.CopyFrom(_widened(tensor))
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t") and attribute.t.data_type in low:
                attribute.t.CopyFrom(_widened(attribute.t))
            elif node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
                values = np.array(onnx.helper.get_attribute_value(attribute), np.float64)
                attribute.CopyFrom(onnx.helper.make_attribute("value", onnx.numpy_helper.from_array(values)))
            elif attribute.name in ("to", "dtype", "softmax_precision") and attribute.i in low:
                attribute.i = onnx.TensorProto.DOUBLE
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in low:
            value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    graph.ClearField("value_info")
    return wide


def _widened(tensor: "onnx.TensorProto") -> "onnx.TensorProto":
    import onnx

    return onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(np.float64), tensor.name)


def _erf(x: np.ndarray) -> np.ndarray:
    """Compute the error function in float64."""
    return np.fromiter(map(math.erf, x.ravel()), np.float64, x.size).reshape(x.shape)
