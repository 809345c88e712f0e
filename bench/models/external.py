"""Lets an ONNX file that somebody else wrote take part as it is: what is known of it, and who can run it.

Nothing is rewritten: each engine reads the file itself, by its own names, and the reference is the file in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import ml_dtypes
import numpy as np

from bench.backends import Candidate
from bench.correctness.agreement import Errors, measure_allowed
from bench.correctness.rounding import Rounding
from bench.harness.memory import give_memory_back
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
from bench.models.inputs import Inputs
from bench.models.shape import Model, Shape, shape_of
from export.signature import Signature, dtype_named
from gpt.cli import UserError
from gpt.config import GPTConfig

if TYPE_CHECKING:
    import onnx
    from onnx.reference.op_run import OpRun

    from bench.correctness.contrib import Product
    from export.artifact import ExportedModel
    from export.graph import GraphReader

    Replaced = tuple[Product | None, list[type[OpRun]]]  # how products are computed, and operators of their own

NEEDS = "needs the model's checkpoint, and an ONNX file is all there is"
RELAY = tuple(COMPILED_RELAY.format(level) for level in (0, 3))
QUANTISED = (EXPORTED_INT8, *(OPENVINO.format(bits) for bits in (8, 4)))  # by tools of engines
FILES = (  # that are made of an ONNX file without its checkpoint, or are the file itself
    EXPORTED,
    COMPILED_O0,
    COMPILED_O3,
    *(COMPILED_LOW[0].format(precision) for precision in ("bf16", "int8", "int4")),
    *RELAY,
    *QUANTISED,
)
OURS_ALONE = {
    **dict.fromkeys(RELAY, "Relay is given this project's own exports alone"),
    **dict.fromkeys(QUANTISED, "its tool for fewer bits is given this project's own exports alone"),
}
LONGEST = 1024  # tokens of a model of which nothing says how many it takes
ROTARY = {"RotaryEmbedding": 2, "GroupQueryAttention": 7}  # the input that is a table with a row for each position
HEADS = ("MatMul", "Gemm", "FusedMatMul", "MatMulNBits")  # the last of them gives the logits
# ONNX Runtime's own products, and the input that is their matrix of weights.
PRODUCTS = {"Attention": 1, "FusedMatMul": 1, "DynamicQuantizeMatMul": 1, "MatMulIntegerToFloat": 1}
# What an engine of each precision is compared with, and whose errors are the measure of what is allowed.
BY_EVALUATOR = "the file in float64; the measure is the file"
BY_ROUNDING = (
    "the file in float64 with its weights rounded as the engine rounds them; the measure is the same with what "
    "products are given rounded too"
)
JUDGES = {
    "fp32": f"{BY_EVALUATOR} as it is written, both by ONNX's reference evaluator",
    "bf16": f"{BY_EVALUATOR} with its products and sums rounded to bfloat16",
    "fp16": f"{BY_EVALUATOR} with its products and sums rounded to float16",
    "int8": BY_ROUNDING,
    "int4": f"{BY_ROUNDING}, to 8 bits",
}


@dataclass(frozen=True)
class External:
    """What is known of an ONNX file.

    signature: how it is called. shape: its sizes. sha256: as the compiler records it. ours: whether this project wrote
    it. tokenizer: of one that did, as `gpt.tokenizer` spells it.
    """

    signature: Signature
    shape: Shape
    sha256: str
    ours: bool
    tokenizer: dict[str, Any] | None


def open_external(source: Path, folder: Path) -> tuple[Artifacts, str]:
    """Return the artifacts of an ONNX file, which lie in a subfolder, and a description of it.

    Raises UserError with the reason for a file that cannot be compared.
    """
    read_external(source)
    return Artifacts(folder / f"onnx-{source.stem}", onnx=source), f"the model in {source}"


@cache
def read_external(source: Path) -> External:
    """Find out what is known of an ONNX file.

    Raises UserError for one that is damaged, that nobody knows how to call, or that has no reference in float64.
    """
    from bench.correctness.evaluator import check_known, inlined
    from export.artifact import PRECISIONS, PREFIX, exported_from, read_onnx
    from export.foreign import check_numbers, check_readable, sha256_onnx
    from export.interface import signature_of
    from export.storage import read_weights

    file = read_onnx(source)
    exported = None
    if any(prop.key.startswith(PREFIX) for prop in file.proto.metadata_props):
        exported = exported_from(file)
        if exported.form == "cached":
            raise UserError(
                f"{source}: an export with a preallocated cache, which is compared where its checkpoint is: "
                f"python -m bench --artifacts {source.parent}; or export it with --cache past"
            )
    proto, sha256 = inlined(file.proto), sha256_onnx(file)
    if exported is not None and exported.form == "forward" and exported.precision in PRECISIONS:
        sha256 = exported.sha256  # as the compiler records it
    read_weights(proto, source)
    check_readable(proto, source)
    check_numbers(proto, source)
    try:
        check_known(proto)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    signature = signature_of(proto)
    try:
        shape = _shape_of(proto, signature, exported)
    except UserError as error:
        raise UserError(f"{source}: {error}; python -m export.inspect {source} shows how it is called") from error
    finally:
        del file, proto
        give_memory_back()
    return External(signature, shape, sha256, exported is not None, exported.tokenizer if exported else None)


def _shape_of(proto: "onnx.ModelProto", signature: Signature, exported: "ExportedModel | None") -> Shape:
    """Return the sizes of a file. Raises UserError where they cannot be told."""
    from export.foreign import check_callable, goes_on, tokens_of
    from export.graph import GraphReader

    check_callable(signature)
    vocab_size = tokens_of(signature)
    assert signature.ids is not None  # `check_callable` has seen to both
    assert vocab_size is not None
    reader = GraphReader(proto)
    B, T = (dim if isinstance(dim, int) else None for dim in signature.input(signature.ids).dims)
    past = [_kept(signature, name) for name in signature.past]
    config = exported.config if exported else _config_of(reader)
    weights = _weights_of(reader)
    shape = shape_of(config) if config else None
    return Shape(
        block_size=T or signature.longest or _rotary_rows(reader) or LONGEST,
        vocab_size=vocab_size,
        width=shape.width if shape else weights[-1].numbers // vocab_size if weights else 0,
        weights=sum(weight.numbers for weight in weights),
        columns=shape.columns if shape else sum(weight.columns for weight in weights),
        kept=shape.kept if shape else sum(each.numbers for each in past) // 2,
        heads=shape.heads if shape else sum(each.columns for each in past) // 2,
        has_cache=goes_on(signature),
        about=shape.about if shape else "no GPT-2 that could be recognised",
        weight_bytes=sum(weight.bytes for weight in weights),
        kept_bytes=sum(each.bytes for each in past) if past else None,
        fixed=(B, T),
    )


def _config_of(reader: "GraphReader") -> GPTConfig | None:
    """Return the shape of the GPT-2 that a file is, None if it is another model."""
    try:
        return reader.config()
    except UserError:
        return None


@dataclass(frozen=True)
class _Numbers:
    """How many numbers something has, in how many columns, or heads, and in how many bytes."""

    numbers: int
    columns: int
    bytes: int


def _weights_of(reader: "GraphReader") -> list[_Numbers]:
    """Return the matrices of weights in products, one for each product; the last is that of the head."""
    found = [_Numbers(each.numbers, min(each.dims), each.bytes) for each in reader.product_weights if each.dims]
    for node in reader.graph.node:
        if node.domain in ("", "ai.onnx"):
            continue
        if node.op_type == "MatMulNBits" and node.input[1] in reader.constants:
            sizes = {attribute.name: attribute.i for attribute in node.attribute}
            packed = sum(reader.constants[name].bytes for name in node.input[1:4] if name in reader.constants)
            found.append(_Numbers(sizes["K"] * sizes["N"], sizes["N"], packed))
        elif (place := PRODUCTS.get(node.op_type)) and (weight := reader.constants.get(node.input[place])):
            found.append(_Numbers(weight.numbers, min(weight.dims, default=1), weight.bytes))
    return found


def _kept(signature: Signature, name: str) -> _Numbers:
    """Return the numbers that a past holds of one token, in how many heads."""
    port, length = signature.input(name), signature.length_axis(name)
    fixed = [dim for axis, dim in enumerate(port.dims) if isinstance(dim, int) and axis not in (0, length)]
    if len(port.dims) == 5 and port.dims[0] == 2:  # keys and values in one
        fixed = [2, *fixed]
    numbers = int(np.prod(fixed))
    return _Numbers(numbers, numbers // fixed[-1] if fixed else 0, numbers * np.dtype(dtype_named(port.dtype)).itemsize)


def _rotary_rows(reader: "GraphReader") -> int | None:
    """Return the rows of the table of rotary angles that a node of ONNX Runtime's own looks up; None if none does."""
    for node in reader.graph.node:
        place = ROTARY.get(node.op_type, len(node.input))
        if place < len(node.input) and (table := reader.constants.get(node.input[place])):
            return table.dims[0]
    return None


def that_can(candidate: Candidate, artifacts: Artifacts) -> Candidate:
    """Restrict a candidate to the phases that it can have of an external file; it is absent if none is left."""
    assert artifacts.onnx is not None
    external = read_external(artifacts.onnx)
    names = {phase: artifacts.name_of(file) for phase, file in candidate.files}
    files = {phase: name for phase, name in names.items() if name in FILES}
    if not files:
        return replace(candidate, absent=candidate.absent or NEEDS)
    refused = [OURS_ALONE[name] for name in files.values() if name in OURS_ALONE and not external.ours]
    return replace(candidate, files=tuple(files.items()), absent=candidate.absent or next(iter(refused), None))


class Reference:
    """Runs an ONNX file in float64 by ONNX's reference evaluator. It is never timed."""

    summary = "the file in float64"
    measure = "ONNX's reference evaluator"
    judges: ClassVar[dict[str, str]] = JUDGES

    def load(self, artifacts: Artifacts, config: Model, threads: int, variant: str) -> None:
        """Load the file; numpy reads the number of threads from the environment."""
        from bench.correctness.evaluator import inlined, widened
        from export.artifact import read_onnx
        from export.storage import read_weights

        assert artifacts.onnx is not None
        file = read_onnx(artifacts.onnx)
        self._proto, self._shape = inlined(file.proto), shape_of(config)
        read_weights(self._proto, artifacts.onnx)
        self._wide = widened(self._proto)
        self._judges: dict[Rounding | None, Callable[[np.ndarray], np.ndarray]] = {}

    def logits(self, ids: np.ndarray, rounding: Rounding | None = None) -> np.ndarray:
        """Compute logits float64 of ids int64 [B, T], by the file with its weights rounded, if they are.

        They are [B, T, V], or [B, 1, V] of a file that gives the last position's alone.
        """
        return self._judge(rounding)(ids)

    def allowed(self, precision: str, rounding: Rounding | None, seed: int) -> Errors:
        """Measure the errors that an engine of a precision may have; see `measure_allowed`.

        What is measured is the same file: in float32, in fewer bits that round each product and sum, or, of an engine
        that rounds to int8 or int4, in float64 with what its products are given rounded too.
        """
        import onnx

        from bench.correctness.evaluator import widened

        if rounding is not None:
            measure = self._run(self._wide, self._rounded(rounding, while_running=True))
        else:
            kind = {"bf16": "bfloat16", "fp16": "float16"}.get(precision) or self._written_in()
            narrow = widened(self._proto, onnx.TensorProto.FLOAT)
            measure = self._run(narrow, _narrow_products(kind) if kind in ("bfloat16", "float16") else (None, []))
        return measure_allowed(self._judge(rounding), measure, self._shape, seed)

    def _judge(self, rounding: Rounding | None) -> Callable[[np.ndarray], np.ndarray]:
        if rounding not in self._judges:
            self._judges = {rounding: self._run(self._wide, self._rounded(rounding))}  # one, as each has all weights
        return self._judges[rounding]

    def _rounded(self, rounding: Rounding | None, *, while_running: bool = False) -> "Replaced":
        if rounding is None:
            return None, []
        products = [node.output[0] for node in self._wide.graph.node if node.op_type in HEADS]
        return _rounding_products(rounding, self._shape.width, products[-1] if products else "", while_running)

    def _written_in(self) -> str:
        """Return the floating type that most weights of the file's products have."""
        from onnx.helper import tensor_dtype_to_np_dtype

        from export.graph import FLOATS, GraphReader

        numbers: dict[str, int] = {}
        for weight in GraphReader(self._proto).product_weights:
            if weight.dtype in FLOATS:
                dtype = str(tensor_dtype_to_np_dtype(weight.dtype))
                numbers[dtype] = numbers.get(dtype, 0) + weight.numbers
        return max(numbers, key=lambda dtype: numbers[dtype], default="float32")

    def _run(self, proto: "onnx.ModelProto", replaced: "Replaced") -> Callable[[np.ndarray], np.ndarray]:
        """Return a function from ids int64 [B, T] to the logits of a model."""
        from bench.correctness.evaluator import evaluator_of
        from export.interface import signature_of

        evaluator, inputs = evaluator_of(proto, *replaced), Inputs(signature_of(proto))
        rows = self._shape.fixed[0]

        def logits_of(ids: np.ndarray) -> np.ndarray:
            B = len(ids)
            if rows is not None and rows > B:  # a file of one B
                ids = np.resize(ids, (rows, ids.shape[1]))
            results = evaluator.run([inputs.signature.logits], inputs(ids) | inputs.empty(len(ids)))
            assert isinstance(results, list)  # it is a dict only where intermediate results are asked for
            return results[0][:B]

        return logits_of


def _rounding_products(rounding: Rounding, width: int, head: str, while_running: bool) -> "Replaced":
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

    return product_of, [Gather]


def _narrow_products(kind: str) -> "Replaced":
    """Define products and sums whose inputs and results have the bits of bfloat16 or float16, held in float32."""
    from onnx.reference.op_run import OpRun

    dtype = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[kind]

    def narrow(x: np.ndarray) -> np.ndarray:
        return x.astype(dtype).astype(x.dtype)

    class Add(OpRun):
        def _run(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray]:
            return (narrow(a + b) if a.dtype.kind == "f" else a + b,)

    return (lambda x, weight, name: narrow(np.matmul(narrow(x), narrow(weight)))), [Add]
