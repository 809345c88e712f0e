"""ONNX files that this project did not write: GPT-2 of transformers by torch.onnx, and files that cannot be used."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from export.artifact import load_exported
from export.foreign import adopt, examine
from export.inspect import describe
from export.masks import say_causal
from gpt.cli import UserError
from gpt.config import GPTConfig

transformers = pytest.importorskip("transformers")
DYNAMIC = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
IDS = torch.arange(16).reshape(2, 8)
CONFIG = GPTConfig(block_size=32, vocab_size=211, n_layer=2, n_head=4, n_embd=40)


@pytest.fixture(scope="module")
def gpt2() -> Any:
    """A GPT-2 of transformers with random weights, all of which move the logits."""
    torch.manual_seed(0)
    shape = {"n_positions": 32, "vocab_size": 211, "n_layer": 2, "n_head": 4, "n_embd": 40}
    settings = transformers.GPT2Config(**shape, use_cache=False, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def theirs(gpt2: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The file that torch.onnx writes of it, nothing of this project in between."""
    folder, made = tmp_path_factory.mktemp("theirs"), {}

    def export(opset: int = 23, attention: str = "sdpa", inputs: tuple[str, ...] = ("input_ids",)) -> Path:
        path = folder / f"{opset}-{attention}-{len(inputs)}.onnx"
        if path not in made:
            positions = torch.arange(8).expand(2, 8)
            given = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "position_ids": positions}
            gpt2.config._attn_implementation = attention
            torch.onnx.export(
                gpt2,
                kwargs={name: given[name] for name in inputs},
                f=path,
                input_names=list(inputs),
                output_names=["logits"],
                opset_version=opset,
                dynamo=True,
                dynamic_shapes=dict.fromkeys(inputs, DYNAMIC),
                verbose=False,
            )
            made[path] = path
        return path

    return export


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"opset": 23},
        {"opset": 18},
        {"attention": "eager"},
        {"inputs": ("input_ids", "attention_mask", "position_ids")},
    ],
    ids=str,
)
def test_gpt2_of_transformers_is_brought_to_our_form(
    theirs: Callable, gpt2: Any, settings: dict, tmp_path: Path
) -> None:
    adopted = adopt(theirs(**settings), tmp_path / "model.onnx")
    assert adopted.config == CONFIG
    assert (adopted.form, adopted.opset) == ("forward", settings.get("opset", 23))
    session = onnxruntime.InferenceSession(adopted.path)
    assert [value.name for value in (*session.get_inputs(), *session.get_outputs())] == ["ids", "logits"]
    for B, T in ((1, 1), (3, 17), (1, 32)):
        ids = torch.randint(211, (B, T))
        with torch.inference_mode():
            expected = gpt2(ids).logits.numpy()
        (logits,) = session.run(["logits"], {"ids": ids.numpy()})
        assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.parametrize("inputs", [("input_ids",), ("input_ids", "attention_mask", "position_ids")], ids=len)
def test_a_causal_mask_becomes_an_attribute(theirs: Callable, tmp_path: Path, inputs: tuple[str, ...]) -> None:
    proto = onnx.load(adopt(theirs(inputs=inputs), tmp_path / "model.onnx").path)
    attentions = [node for node in proto.graph.node if node.op_type == "Attention"]
    assert [len(node.input) for node in attentions] == [3, 3]
    assert {node.op_type for node in proto.graph.node}.isdisjoint({"CumSum", "GatherND", "LessOrEqual"})


@pytest.mark.parametrize(("mask", "causal"), [("tril", 1), ("triu", 0), ("ones", 0), ("added", 1), ("of ids", 0)])
def test_only_a_causal_mask_does(mask: str, causal: int) -> None:
    """q, k and v of [B, 2, T, 4]; the mask is made from the shape of the ids, or from what they are."""
    nodes = [
        helper.make_node("Shape", ["ids"], ["TT"], start=1, end=2),
        helper.make_node("Concat", ["TT", "TT"], ["shape"], axis=0),
        helper.make_node(
            "ConstantOfShape", ["shape"], ["ones"], value=helper.make_tensor("", TensorProto.INT64, [1], [1])
        ),
        helper.make_node("Trilu", ["ones"], ["lower"], upper=0),
        helper.make_node("Trilu", ["ones"], ["upper"], upper=1),
        helper.make_node("Cast", [{"triu": "upper", "ones": "ones"}.get(mask, "lower")], ["seen"], to=TensorProto.BOOL),
        helper.make_node("Where", ["seen", "zero", "minus"], ["added"]),
        helper.make_node("Cast", ["ids"], ["not zero"], to=TensorProto.BOOL),
        helper.make_node("And", ["seen", "not zero"], ["of ids"]),
        helper.make_node(
            "Attention", ["q", "q", "q", mask if mask in ("added", "of ids") else "seen"], ["y"], is_causal=0
        ),
    ]
    floats = [
        helper.make_tensor("zero", TensorProto.FLOAT, [], [0.0]),
        helper.make_tensor("minus", TensorProto.FLOAT, [], [float("-inf")]),
    ]
    inputs = [
        helper.make_tensor_value_info("ids", TensorProto.INT64, ["B", "T"]),
        helper.make_tensor_value_info("q", TensorProto.FLOAT, ["B", 2, "T", 4]),
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", 2, "T", 4])
    opset = helper.make_opsetid("", 23)
    graph = ir.from_proto(
        helper.make_model(helper.make_graph(nodes, "g", inputs, [output], floats), opset_imports=[opset])
    ).graph
    assert say_causal(graph) == causal
    assert graph[-1].attributes.get_int("is_causal") == causal
    assert len(graph[-1].inputs) == 4 - causal


@pytest.mark.slow
def test_a_function_of_its_own_is_spelled_out(theirs: Callable, tmp_path: Path) -> None:
    proto = onnx.load(theirs())
    node = next(node for node in proto.graph.node if node.op_type == "Add")
    body = [helper.make_node("Add", ["a", "b"], ["ids"])]  # a name that the adopted file has for something else
    opsets = [helper.make_opsetid("", 23)]
    proto.functions.append(helper.make_function("theirs", "Sum", ["a", "b"], ["ids"], body, opsets))
    proto.opset_import.append(helper.make_opsetid("theirs", 1))
    node.op_type, node.domain = "Sum", "theirs"
    onnx.save(proto, tmp_path / "theirs.onnx")
    adopted = onnx.load(adopt(tmp_path / "theirs.onnx", tmp_path / "model.onnx").path)
    assert not adopted.functions
    assert {node.domain for node in adopted.graph.node} == {""}


def test_values_that_have_our_names_get_others(theirs: Callable, tmp_path: Path) -> None:
    proto = onnx.load(theirs())
    renamed = {proto.graph.initializer[0].name: "ids", proto.graph.node[0].output[0]: "logits", "logits": "scores"}
    for node in proto.graph.node:
        for names in (node.input, node.output):
            names[:] = [renamed.get(name, name) for name in names]
    for value in (*proto.graph.initializer, *proto.graph.value_info, *proto.graph.output):
        value.name = renamed.get(value.name, value.name)
    onnx.save(proto, tmp_path / "theirs.onnx")
    adopted = onnx.load(adopt(tmp_path / "theirs.onnx", tmp_path / "model.onnx").path)
    assert [value.name for value in (*adopted.graph.input, *adopted.graph.output)] == ["ids", "logits"]


def test_its_external_data_come_along(theirs: Callable, tmp_path: Path) -> None:
    source = theirs()
    assert source.with_name(source.name + ".data").exists()
    adopted = adopt(source, tmp_path / "model.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert load_exported(adopted.path) == adopted


def test_a_model_too_large_for_one_file_has_two(
    theirs: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = adopt(theirs(), tmp_path / "whole.onnx")
    monkeypatch.setattr("export.storage.INLINE_BYTES", 10_000)
    adopted = adopt(theirs(), tmp_path / "model.onnx")
    assert adopted.weights is not None
    assert {file.name for file in tmp_path.iterdir()} == {"whole.onnx", "model.onnx", adopted.weights.name}
    logits = [onnxruntime.InferenceSession(each.path).run(None, {"ids": IDS.numpy()})[0] for each in (whole, adopted)]
    assert np.array_equal(*logits)


@pytest.mark.parametrize(("keep", "says"), [(None, "missing"), (100, "truncated at 100")])
def test_without_all_its_external_data_it_is_refused(
    theirs: Callable, tmp_path: Path, keep: int | None, says: str
) -> None:
    source = tmp_path / "theirs.onnx"
    proto = onnx.load(theirs())
    onnx.save(proto, source, save_as_external_data=True, location="theirs.data", size_threshold=0)
    if keep is None:
        (tmp_path / "theirs.data").unlink()
    else:
        (tmp_path / "theirs.data").write_bytes((tmp_path / "theirs.data").read_bytes()[:keep])
    assert [line for line in describe(source) if line.startswith("external data: theirs.data") and says in line]
    with pytest.raises(UserError, match=r"its external data cannot be read .*copy them beside it again"):
        adopt(source, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_external_data_behind_links_are_read(theirs: Callable, tmp_path: Path) -> None:
    """As a hub's cache keeps them: both files are links into another folder, where they have other names."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    source = tmp_path / "snapshot" / "theirs.onnx"
    onnx.save(onnx.load(theirs()), source, save_as_external_data=True, location="theirs.data", size_threshold=0)
    for number, file in enumerate(sorted(source.parent.iterdir())):
        file.rename(tmp_path / "blobs" / str(number))
        file.symlink_to(Path("..", "blobs", str(number)))
    adopted = adopt(source, tmp_path / "model.onnx")
    whole = adopt(theirs(), tmp_path / "whole.onnx")
    logits = [onnxruntime.InferenceSession(each.path).run(None, {"ids": IDS.numpy()})[0] for each in (whole, adopted)]
    assert np.array_equal(*logits)


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "a/../../secret", ""])
def test_external_data_elsewhere_are_refused(theirs: Callable, tmp_path: Path, location: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "secret").write_bytes(bytes(10**6))
    source = tmp_path / "folder" / "theirs.onnx"
    onnx.save(onnx.load(theirs()), source, save_as_external_data=True, location="theirs.data", size_threshold=0)
    proto = onnx.load(source, load_external_data=False)
    for entry in proto.graph.initializer[0].external_data:
        entry.value = location if entry.key == "location" else entry.value
    source.write_bytes(proto.SerializeToString())
    with pytest.raises(UserError, match="which is not beside it: refused"):
        adopt(source, tmp_path / "model.onnx")
    assert any("which is not beside it: refused" in line for line in describe(source))


def test_inspect_says_that_it_can_be_used(theirs: Callable) -> None:
    lines = list(describe(theirs()))
    assert "metadata: none of this project" in lines
    assert lines[-1] == f"can be used: python -m bench --onnx {theirs()}"
    assert any(line.startswith("a GPT-2, read from the graph: block_size=32, vocab_size=211") for line in lines)


def changed(path: Path, change: Callable[[onnx.ModelProto], None]) -> onnx.ModelProto:
    proto = onnx.load(path)
    change(proto)
    return proto


def foreign_operator(proto: onnx.ModelProto) -> None:
    next(node for node in proto.graph.node if node.op_type == "Tanh").domain = "com.microsoft"


def static_batch(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2


def other_dtype(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.elem_type = TensorProto.INT32


def half_logits(proto: onnx.ModelProto) -> None:
    proto.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16


def cache_inputs(proto: onnx.ModelProto) -> None:
    proto.graph.input.append(
        helper.make_tensor_value_info("past_key_values.0.key", TensorProto.FLOAT, ["B", 4, "P", 10])
    )


def unknown_input(proto: onnx.ModelProto) -> None:
    proto.graph.input.append(helper.make_tensor_value_info("token_type", TensorProto.FLOAT, ["B"]))


def no_positions(proto: onnx.ModelProto) -> None:
    gather = next(node for node in proto.graph.node if "wpe" in node.input[0])
    gather.op_type = "Identity"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (foreign_operator, "operator Tanh of domain com.microsoft: not of ONNX itself"),
        (static_batch, r"input input_ids: its shape \[2, 's\d+'\] fixes 2"),
        (other_dtype, "input input_ids: is int32 .*, must be int64"),
        (half_logits, "output logits: is float16, must be float32"),
        (cache_inputs, r"inputs past_key_values.0.key, …: it takes a KV cache"),
        (unknown_input, "input token_type: nothing to fill it with"),
        (no_positions, r"not a GPT-2 that could be recognised: it gathers from tables \[211, 40\]"),
    ],
)
def test_what_is_missing_is_said(
    theirs: Callable, tmp_path: Path, change: Callable[[onnx.ModelProto], None], says: str
) -> None:
    proto = changed(theirs(), change)
    onnx.save(proto, tmp_path / "theirs.onnx")
    found = examine(proto)
    assert len(found.missing) == 1
    with pytest.raises(UserError, match=says):
        adopt(tmp_path / "theirs.onnx", tmp_path / "model.onnx")
    lines = list(describe(tmp_path / "theirs.onnx"))
    assert lines[-2:] == ["cannot be used as it is:", f"  - {found.missing[0]}"]
    assert not (tmp_path / "model.onnx").exists()


def test_a_model_that_is_no_gpt_is_not_taken_for_one(tmp_path: Path) -> None:
    torch.onnx.export(torch.nn.Linear(4, 4), (torch.ones(1, 4),), tmp_path / "linear.onnx", verbose=False)
    found = examine(onnx.load(tmp_path / "linear.onnx"))
    assert found.config is None
    assert any(line.startswith("no input of token ids") for line in found.missing)
    assert list(describe(tmp_path / "linear.onnx"))[-1].startswith("  - not a GPT-2 that could be recognised")
