"""ONNX files that this project did not write: what `export.inspect` says of them, and that it keeps its word."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bench.models.external import read_external
from export.artifact import read_onnx
from export.foreign import check_callable, goes_on, tokens_of
from export.inspect import describe
from export.interface import signature_of
from export.storage import read_weights
from gpt.cli import UserError
from tvm_frontend.frontends import read_source

V, C = 37, 8  # of the file that `foreign_file` writes
Change = Callable[[onnx.ModelProto], object]


@pytest.fixture
def theirs(foreign_file: Callable[..., Path], tmp_path: Path) -> Path:
    return foreign_file(tmp_path / "theirs.onnx")


def changed(path: Path, change: Change) -> Path:
    proto = onnx.load(path)
    change(proto)
    onnx.save(proto, path)
    return path


def test_inspect_says_how_a_file_is_called_and_what_takes_it(theirs: Path) -> None:
    lines = list(describe(theirs))
    for line in (
        "metadata: none of this project",
        "input   input_ids: int64 [b, t]: token ids",
        "input   attention_mask: int64 [b, all]: mask, 1 for each token that is to be seen",
        "input   position_ids: int64 [b, t]: positions",
        "input   past_key_values.0.key: float32 [b, 1, past, 8]: past, given back longer as present.0.key",
        "output  logits: float32 [b, t, 37]: logits",
        "output  present.0.key: float32 [b, 1, past + t, 8]",
        "token ids: 0 … 36; positions for 16 of them",
    ):
        assert line in lines
    assert any(line.startswith("not a GPT-2 that could be recognised: it has no") for line in lines)
    bench, generate, compiler = lines[-3:]
    phases = "prefill, decode, generate"
    assert bench == f"python -m bench --onnx {theirs}  # every engine that can run it, against it in float64: {phases}"
    assert generate.startswith(f"python -m bench.generate --engine onnxruntime --onnx {theirs}  # ")
    assert compiler.startswith(f"python -m tvm_frontend.compile {theirs}  # as it is; ")


def test_without_a_past_there_is_nothing_to_go_on_from(foreign_file: Callable[..., Path], tmp_path: Path) -> None:
    path = foreign_file(tmp_path / "theirs.onnx", past=False)
    *_, bench, compiler = describe(path)
    assert bench.endswith("prefill, as it has no KV cache to go on from")
    assert compiler.startswith("python -m tvm_frontend.compile")


def add_input(proto: onnx.ModelProto) -> None:
    proto.graph.input.append(helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["B", 3]))


def no_ids(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.shape.dim.add().dim_value = 1
    proto.graph.node[0].op_type = "GatherND"
    proto.graph.input[0].name = "codes"
    for node in proto.graph.node:
        node.input[:] = ["codes" if name == "input_ids" else name for name in node.input]


def no_logits(proto: onnx.ModelProto) -> None:
    proto.graph.output[0].name = proto.graph.node[-1].output[0] = "states"
    proto.graph.output[0].type.tensor_type.shape.dim.pop()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (add_input, "input pixels: nothing is known to give it"),
        (no_ids, "no input of token ids, of whole numbers [B, T], could be told among its inputs"),
        (no_logits, "no output of logits, of floating numbers [B, T, V], could be told among its outputs"),
    ],
)
def test_what_nobody_knows_how_to_call_is_not_for_the_bench(theirs: Path, change: Change, says: str) -> None:
    changed(theirs, change)
    *_, bench, compiler = describe(theirs)
    assert bench == f"cannot be called by token ids alone, so not by python -m bench: {says}"
    assert compiler.startswith("python -m tvm_frontend.compile")
    with pytest.raises(UserError):
        read_external(theirs)
    if change is not no_ids:  # its GatherND is another matter
        read_source("onnx", theirs)  # as all that it takes is for the caller to give


def nan(proto: onnx.ModelProto) -> None:
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == "head")
    tensor.CopyFrom(numpy_helper.from_array(np.full((C, V), np.nan, np.float32), "head"))


def twice(proto: onnx.ModelProto) -> None:
    proto.graph.node.append(proto.graph.node[-1])


def no_opset(proto: onnx.ModelProto) -> None:
    proto.opset_import[0].domain = "com.others"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (nan, "weight 'head' holds NaN or infinity; export a model that is sound"),
        (twice, "ONNX's checker refuses it (Graph must be in single static assignment (SSA) form"),
        (no_opset, "names no opset of ONNX itself; export it again"),
    ],
)
def test_what_cannot_be_used_is_refused_by_all_in_the_same_words(theirs: Path, change: Change, says: str) -> None:
    changed(theirs, change)
    *_, last = describe(theirs)
    assert last.startswith(f"cannot be used: {says}")
    for read in (read_external, lambda path: read_source("onnx", path)):
        with pytest.raises(UserError) as refused:
            read(theirs)
        assert str(refused.value).startswith(f"{theirs}: {says}")


def test_logits_of_the_last_position_are_not_gone_on_from(theirs: Path) -> None:
    def last_alone(proto: onnx.ModelProto) -> None:
        proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 1

    signature = signature_of(onnx.load(theirs))
    assert goes_on(signature)
    check_callable(signature)
    last = signature_of(onnx.load(changed(theirs, last_alone)))
    assert not goes_on(last)
    check_callable(last)


def test_how_many_tokens_there_are_is_told_by_the_logits_too(theirs: Path) -> None:
    def compute_table(proto: onnx.ModelProto) -> None:
        for node in proto.graph.node:
            node.input[:] = ["computed" if name == "wte" else name for name in node.input]
        proto.graph.node.insert(0, helper.make_node("Softplus", ["wte"], ["computed"]))

    signature = signature_of(onnx.load(changed(theirs, compute_table)))
    assert (signature.vocab_size, tokens_of(signature)) == (None, V)


def save_outside(path: Path) -> None:
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="theirs.data", size_threshold=0)


def read(path: Path) -> Any:
    proto = read_onnx(path).proto
    read_weights(proto, path)
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


@pytest.mark.parametrize(("keep", "says"), [(None, "missing"), (100, "truncated at 100")])
def test_without_all_its_external_data_it_is_refused(theirs: Path, keep: int | None, says: str) -> None:
    save_outside(theirs)
    data = theirs.with_name("theirs.data")
    if keep is None:
        data.unlink()
    else:
        data.write_bytes(data.read_bytes()[:keep])
    lines = list(describe(theirs))
    assert [line for line in lines if line.startswith("external data: theirs.data") and says in line]
    assert lines[-1].startswith("cannot be used: its external data cannot be read")
    with pytest.raises(UserError, match=r"its external data cannot be read .*copy them beside it again"):
        read(theirs)
    with pytest.raises(UserError, match=r"theirs\.onnx: its (weights|external data)"):
        read_external(theirs)


def test_external_data_behind_links_are_read(theirs: Path, tmp_path: Path) -> None:
    """As a hub's cache keeps them: both files are links into another folder, where they have other names."""
    whole = read(theirs)
    (tmp_path / "blobs").mkdir()
    save_outside(theirs)
    for number, file in enumerate((theirs, theirs.with_name("theirs.data"))):
        file.rename(tmp_path / "blobs" / str(number))
        file.symlink_to(Path("blobs", str(number)))
    found = read(theirs)
    assert found.keys() == whole.keys()
    assert all(np.array_equal(found[name], whole[name]) for name in whole)


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "a/../../secret", ""])
def test_external_data_elsewhere_are_refused(theirs: Path, tmp_path: Path, location: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "secret").write_bytes(bytes(10**6))
    source = theirs.rename(tmp_path / "folder" / "theirs.onnx")
    save_outside(source)
    proto = onnx.load(source, load_external_data=False)
    for entry in proto.graph.initializer[0].external_data:
        entry.value = location if entry.key == "location" else entry.value
    source.write_bytes(proto.SerializeToString())
    with pytest.raises(UserError, match="which is not beside it: refused"):
        read(source)
    assert any("which is not beside it: refused" in line for line in describe(source))


def test_a_model_that_is_no_gpt_is_not_taken_for_one(tmp_path: Path) -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy"]
    weights = [numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "linear", values[:1], values[1:], weights
    )
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "linear.onnx")
    lines = list(describe(tmp_path / "linear.onnx"))
    assert "input   x: float32 [1, 4]: nothing is known to give it" in lines
    assert any(line.startswith("not a GPT-2 that could be recognised") for line in lines)
    assert lines[-2].startswith("cannot be called by token ids alone, so not by python -m bench: no input of token ids")
