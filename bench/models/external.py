"""An ONNX file that somebody else wrote, compared as our own are: what it is held to, and which engines can run it."""

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

PHASES = ("prefill",)  # that a file without a cache can do
NEEDS = "needs the model's checkpoint, and an ONNX file is all there is"
# What can be made of an ONNX file alone.
FILES = (
    EXPORTED,
    COMPILED_O0,
    COMPILED_O3,
    *(COMPILED_RELAY.format(level) for level in (0, 3)),
    *(COMPILED_LOW[0].format(precision) for precision in ("bf16", "int8", "int4")),
    EXPORTED_INT8,
    *(OPENVINO.format(bits) for bits in (8, 4)),
)


def adopt_foreign(source: Path, folder: Path) -> tuple[Artifacts, str]:
    """The artifacts of somebody's file, in a folder of its own that holds it in our form, and in words what it is.

    Raises UserError for a file that cannot be used, saying why.
    """
    from export.artifact import load_exported
    from export.foreign import adopt

    artifacts = Artifacts(folder / f"onnx-{source.stem}")
    if not (source.is_file() and artifacts.exported.exists()) or (
        load_exported(artifacts.exported).checkpoint_sha256 != sha256_file(source)
    ):
        print(f"bringing {source} to this project's form: {artifacts.exported}", file=sys.stderr, flush=True)
        adopt(source, artifacts.exported)
    return artifacts, f"the model in {source}"


def is_foreign(artifacts: Artifacts) -> bool:
    """Whether all there is, is somebody's ONNX file in our form."""
    return artifacts.exported.exists() and not artifacts.checkpoint.exists()


def checked_phases(asked: Iterable[str]) -> tuple[str, ...]:
    """The phases to compare. Raises UserError for one that needs a KV cache."""
    if wrong := [name for name in asked if name not in PHASES]:
        raise UserError(
            f"phase {wrong[0]!r}: must be {', '.join(PHASES)} with an ONNX file, which has no KV cache here"
        )
    return PHASES


def without_checkpoint(candidate: Candidate) -> Candidate:
    """The candidate with the phases that an ONNX file alone allows; absent if there is none."""
    files = tuple((phase, file) for phase, file in candidate.files if file in FILES)
    return replace(candidate, files=files) if files else replace(candidate, absent=NEEDS)


class Reference:
    """The graph of a folder's ONNX file in float64, by ONNX's own reference evaluator. Not an engine: never timed."""

    summary = "ONNX's reference evaluator in float64"

    def load(self, artifacts: Artifacts, config: GPTConfig, threads: int, variant: str) -> None:
        """Make ready; the number of threads is in the environment, where numpy reads it."""
        import onnx

        self._evaluator = evaluator_of(in_float64(onnx.load(artifacts.exported)))

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """Logits float64 [B, T, V] of ids int64 [B, T]."""
        return self._evaluator.run(["logits"], {"ids": ids})[0]


def evaluator_of(proto: "onnx.ModelProto") -> "ReferenceEvaluator":
    """ONNX's reference evaluator, its error function and GELU in the precision of what they are given.

    Its own Erf rounds to float32 on the way, and its Gelu is spelled with constants in float32.
    """
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import OpRun

    class Erf(OpRun):
        def _run(self, x):
            return (_erf(x).astype(x.dtype),)

    class Gelu(OpRun):
        def _run(self, x, approximate="none"):
            inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
            share = np.tanh(inner) if approximate == "tanh" else _erf(x / math.sqrt(2))
            return ((0.5 * x * (1 + share)).astype(x.dtype),)

    return ReferenceEvaluator(proto, new_ops=[Erf, Gelu])


def in_float64(proto: "onnx.ModelProto") -> "onnx.ModelProto":
    """The same graph in which every number of float16, bfloat16 or float32 is a float64, casts included."""
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
    """The error function in float64."""
    return np.fromiter(map(math.erf, x.ravel()), np.float64, x.size).reshape(x.shape)
