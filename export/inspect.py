"""Show what is in an ONNX file, ours or somebody else's, how it is called, and which commands take it.

python -m export.inspect                               # artifacts/model.onnx
python -m export.inspect theirs.onnx
"""

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is one line too
    from gpt.cli import run_main

    run_main("export.inspect", prints=True)

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import onnx
import tyro
from onnx.external_data_helper import uses_external_data

from export.artifact import PREFIX, ExportedModel, exported_from, read_onnx
from export.foreign import check_callable, check_numbers, check_readable, goes_on, tokens_of
from export.graph import GraphReader, dims_of, dtype_of, opsets_of
from export.interface import signature_of
from export.signature import COUNTED, PAST, SEEN, ZEROS, Signature
from export.storage import place_of, read_weights
from gpt.cli import UserError
from gpt.config import GPTConfig
from gpt.costs import prefill_flops_per_token
from gpt.files import find_input

# What an input is, by its role in `export.signature.Signature`.
ROLES = {
    SEEN: "mask, 1 for each token that is to be seen",
    COUNTED: "positions",
    PAST: "past, given back longer as {}",
    ZEROS: "zeros",
}


def describe(path: Path) -> Iterator[str]:
    """Yield the lines of the report. Raises UserError for a file that is not ONNX, or is a damaged one of ours."""
    file = read_onnx(path)
    proto = file.proto
    reader = GraphReader(proto)
    ours = any(prop.key.startswith(PREFIX) for prop in proto.metadata_props)
    exported = exported_from(file) if ours else None
    yield from _file_lines(path, proto)
    yield from _metadata_lines(exported) if exported else ["metadata: none of this project"]
    signature = signature_of(proto)
    yield from (
        "",
        *_interface_lines(reader, None if exported else signature),
        "",
        *_node_lines(reader),
        "",
        *_parameter_lines(path, reader),
    )
    yield from ("", *_flops_lines(reader, exported.config if exported else None))
    if not exported:
        yield from ("", *_model_lines(signature, reader), "", *_use_lines(path, proto, signature))


def _file_lines(path: Path, proto: onnx.ModelProto) -> Iterator[str]:
    opsets = ", ".join(f"{domain} {version}" for domain, version in opsets_of(proto).items())
    producer = f"{proto.producer_name or 'unknown'} {proto.producer_version}".strip()
    yield f"{path}: {path.stat().st_size / 1e6:,.1f} MB, opset {opsets}, IR {proto.ir_version}, written by {producer}"


def _metadata_lines(exported: ExportedModel) -> Iterator[str]:
    config = ", ".join(f"{name}={value}" for name, value in vars(exported.config).items())
    characters = exported.tokenizer.get("characters")
    yield f"config: {config}"
    yield f"tokenizer: {exported.tokenizer['kind']}{f', {len(characters)}: {characters!r}' if characters else ''}"
    yield f"dtype: {exported.dtype}"
    yield f"exporter: {exported.exporter}"
    yield f"version: {exported.version or 'not recorded'}"
    for name, entry in exported.entry_points.items():
        yield f"entry point: {name}"
        for direction in ("inputs", "outputs"):
            for value, (dtype, dims) in entry[direction].items():
                yield f"  {direction[:-1]:6} {value}: {dtype} {json.dumps(dims)}"
    yield f"made from the file with sha256 {exported.checkpoint_sha256}"
    yield f"sha256 {exported.sha256}"


def _interface_lines(reader: GraphReader, signature: Signature | None) -> Iterator[str]:
    """Yield the inputs and outputs, with what they are if a signature is given."""
    for direction, values in (("input", reader.inputs), ("output", reader.graph.output)):
        for value in values:
            role = _role(signature, value.name) if signature else ""
            dims = ", ".join(map(str, dims_of(value)))
            yield f"{direction:6}  {value.name}: {dtype_of(value)} [{dims}]{f': {role}' if role else ''}"


def _node_lines(reader: GraphReader) -> Iterator[str]:
    counts = reader.node_counts
    yield f"{sum(counts.values())} nodes: " + ", ".join(f"{name} {count}" for name, count in counts.most_common())


def _parameter_lines(path: Path, reader: GraphReader) -> Iterator[str]:
    by_dtype: Counter[str] = Counter()
    for constant in reader.constants.values():
        by_dtype[onnx.TensorProto.DataType.Name(constant.dtype).lower()] += constant.bytes
    parts = ", ".join(f"{dtype} {size:,}" for dtype, size in by_dtype.most_common())
    yield f"parameters: {reader.parameter_bytes:,} bytes in {len(reader.constants)} tensors ({parts})"
    yield from external_data(path, reader.graph)


def external_data(path: Path, graph: onnx.GraphProto) -> Iterator[str]:
    """Yield a line for each file of weights beside the graph: its size, or what is wrong with it."""
    needed: dict[str, int] = {}
    for tensor in filter(uses_external_data, graph.initializer):
        try:
            location, offset, length = place_of(tensor, path)
            needed[location] = max(needed.get(location, 0), offset + length)
        except UserError as error:
            yield f"external data: {str(error).removeprefix(f'{path}: ')}"
    for name, size in needed.items():
        file = path.parent / name
        there = file.stat().st_size if file.is_file() else None
        state = "missing" if there is None else "whole" if there >= size else f"truncated at {there:,}"
        yield f"external data: {name}, {size:,} bytes, {state}"


def _flops_lines(reader: GraphReader, config: GPTConfig | None) -> Iterator[str]:
    """Yield N as counted in the graph; attention is from the shape, which others' files may not tell."""
    N = reader.flops_per_token // 2
    yield f"FLOPs per token: {2 * N:,} for the {N:,} weights of matrix products"
    try:
        config = config or reader.config()
    except UserError:
        return
    T = config.block_size
    yield f"  with attention over T = {T} tokens, causal: {prefill_flops_per_token(config, T):,.0f}"


def _role(signature: Signature, name: str) -> str:
    """Return what an input or output is, as far as names and shapes tell."""
    if name in (signature.ids, signature.logits):
        return "token ids" if name == signature.ids else "logits"
    if name in signature.unknown:
        return "nothing is known to give it"
    return ROLES[signature.roles[name]].format(signature.presents.get(name)) if name in signature.roles else ""


def _model_lines(signature: Signature, reader: GraphReader) -> Iterator[str]:
    """Yield the sizes of the model, and whether it is a GPT-2."""
    V, longest = tokens_of(signature), signature.longest
    known = "token ids: nothing says how many" if V is None else f"token ids: 0 … {V - 1:,}"
    yield known + ("; nothing says how many it takes" if longest is None else f"; positions for {longest:,} of them")
    try:
        words = ", ".join(f"{name}={value}" for name, value in vars(reader.config()).items())
        yield f"a GPT-2, read from the graph: {words}"
    except UserError as error:
        yield f"not a GPT-2 that could be recognised: {error}"


def _use_lines(path: Path, proto: onnx.ModelProto, signature: Signature) -> Iterator[str]:
    """Yield the commands that take the file, or why none does; what becomes of each node is the compiler's to say."""
    try:
        read_weights(proto, path)
        check_readable(proto, path)
        check_numbers(proto, path)
    except UserError as error:
        yield f"cannot be used: {str(error).removeprefix(f'{path}: ')}"
        return
    try:
        check_callable(signature)
    except UserError as error:
        yield f"cannot be called by token ids alone, so not by python -m bench: {error}"
    else:
        phases = "prefill, decode, generate" if goes_on(signature) else "prefill, as it has no KV cache to go on from"
        yield f"python -m bench --onnx {path}  # every engine that can run it, against it in float64: {phases}"
        if goes_on(signature):
            yield f"python -m bench.generate --engine onnxruntime --onnx {path}  # what it writes after a prompt"
    yield f"python -m tvm_frontend.compile {path}  # as it is; says which node it cannot compile, if there is one"


def inspect_command(
    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="ONNX")] = Path("artifacts/model.onnx"),
) -> None:
    """Show an ONNX file's metadata, inputs and outputs, operators, parameter bytes and FLOPs per token.

    Of a file that this project did not write it also says how it is called, and which commands take it as it is.

    Args:
        model: any ONNX file
    """
    for line in describe(find_input(model)):
        print(line)


def main() -> None:
    """Parse the command line and show."""
    tyro.cli(inspect_command, prog="python -m export.inspect")
