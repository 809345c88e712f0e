"""Lets an external ONNX file, written by other tools, take part: its reference, and the engines that can run it."""

import math
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bench.backends import Candidate
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
        self._evaluator = evaluator_of(in_float64(file.proto))

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """Compute logits float64 [B, T, V] of ids int64 [B, T]."""
        results = self._evaluator.run(["logits"], {"ids": ids})
        assert isinstance(results, list)  # it is a dict only where intermediate results are asked for
        return results[0]


def evaluator_of(proto: "onnx.ModelProto") -> "ReferenceEvaluator":
    """Build ONNX's reference evaluator with Erf and Gelu that compute in the precision of their input.

    Its own Erf rounds to float32, and its Gelu is a function with float32 constants.
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

    return ReferenceEvaluator(proto, new_ops=[Erf, Gelu])


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
