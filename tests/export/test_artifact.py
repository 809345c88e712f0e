import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.artifact import HASH, PREFIX, UNSEALED, load_exported, write_exported
from gpt.cli import UserError
from gpt.version import project_version

ROOT = Path(__file__).parents[2]


def refused(path, said):
    with pytest.raises(UserError, match=said) as caught:
        load_exported(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "python -m export.onnx" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_one_flipped_bit_of_a_weight_is_found(exported, tmp_path):
    content = bytearray(exported.path.read_bytes())
    (weight,) = (w for w in onnx.load(exported.path).graph.initializer if w.name.endswith("0.mlp.c_fc.bias"))
    place = content.find(numpy_helper.to_array(weight).tobytes())
    assert place > 0
    content[place] ^= 1
    (tmp_path / "model.onnx").write_bytes(content)
    refused(tmp_path / "model.onnx", "does not match its own hash")


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99, -1])
def test_a_truncated_file_is_found(exported, tmp_path, kept):
    content = exported.path.read_bytes()
    (tmp_path / "model.onnx").write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    refused(tmp_path / "model.onnx", "not a readable ONNX file|holds no graph|does not match|not an export")


def edit_config(proto):
    (config,) = (prop for prop in proto.metadata_props if prop.key.endswith(".config"))
    config.value = config.value.replace('"block_size": 32', '"block_size": 64')


def edit_opset(proto):
    proto.opset_import[0].version = 24


def edit_graph(proto):
    attention = next(node for node in proto.graph.node if node.op_type == "Attention")
    attention.attribute.append(helper.make_attribute("softcap", 10.0))


def forget_a_key(proto):
    kept = [prop for prop in proto.metadata_props if not prop.key.endswith(".tokenizer")]
    del proto.metadata_props[:]
    proto.metadata_props.extend(kept)


@pytest.mark.parametrize("edit", [edit_config, edit_opset, edit_graph, forget_a_key])
def test_an_edited_file_is_found(exported, tmp_path, edit):
    proto = onnx.load(exported.path)
    before = proto.SerializeToString()
    edit(proto)
    assert proto.SerializeToString() != before
    onnx.save(proto, tmp_path / "model.onnx")
    refused(tmp_path / "model.onnx", "does not match its own hash")


def test_a_file_names_the_version_that_wrote_it_and_one_from_before_that_is_read_too(exported, tmp_path):
    assert exported.version == project_version()
    proto = onnx.load(exported.path)
    metadata = {prop.key: prop.value for prop in proto.metadata_props}
    del metadata[PREFIX + "version"], metadata[PREFIX + HASH]
    onnx.helper.set_model_props(proto, metadata | {PREFIX + HASH: UNSEALED})
    write_exported(proto, tmp_path / "model.onnx")
    found = load_exported(tmp_path / "model.onnx")
    assert found.version is None
    assert found == replace(exported, path=found.path, sha256=found.sha256, version=None)


def test_a_file_of_an_earlier_format_is_said_to_be_one(exported, tmp_path):
    proto = onnx.load(exported.path)
    metadata = {prop.key: prop.value for prop in proto.metadata_props}
    onnx.helper.set_model_props(proto, metadata | {PREFIX + "format": "1"})
    onnx.save(proto, tmp_path / "model.onnx")
    refused(tmp_path / "model.onnx", "has format '1' and this code reads 2; export it again")


@pytest.mark.slow
def test_a_file_whose_metadata_was_stripped_is_refused(cached, tmp_path):
    proto = onnx.load(cached.path)
    proto.ClearField("metadata_props")
    onnx.save(proto, tmp_path / "model.onnx")
    refused(tmp_path / "model.onnx", "not an export of this project")


def foreign():
    """A whole ONNX model, but none of ours."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    return helper.make_model(helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y]))


def test_a_file_without_an_opset_is_refused(exported, tmp_path):
    proto = onnx.load(exported.path)
    del proto.opset_import[:]
    metadata = {prop.key: prop.value for prop in proto.metadata_props if prop.key != PREFIX + HASH}
    onnx.helper.set_model_props(proto, metadata | {PREFIX + HASH: UNSEALED})
    write_exported(proto, tmp_path / "model.onnx")
    refused(tmp_path / "model.onnx", "names no opset of ONNX itself")


def test_somebody_elses_onnx_file_is_refused(tmp_path):
    onnx.save(foreign(), tmp_path / "foreign.onnx")
    refused(tmp_path / "foreign.onnx", "not an export of this project")


def test_so_is_one_whose_weights_lie_in_another_file_that_is_not_there(tmp_path):
    proto = foreign()
    weight = proto.graph.initializer.add(name="w", data_type=TensorProto.FLOAT, dims=[2], raw_data=b"")
    onnx.external_data_helper.set_external_data(weight, "weights.bin")
    weight.ClearField("raw_data")
    (tmp_path / "foreign.onnx").write_bytes(proto.SerializeToString())
    refused(tmp_path / "foreign.onnx", "not an export of this project")


@pytest.mark.parametrize("name", ["model.onnx", "model.json", "model.txt", "model.onnxtxt"])
def test_a_text_is_refused_whatever_it_is_called(tmp_path, name):
    (tmp_path / name).write_text("the quick brown fox\n" * 100)
    refused(tmp_path / name, "not a readable ONNX file")


def test_what_is_not_there_or_a_folder_is_refused(tmp_path):
    refused(tmp_path / "none.onnx", "no such file")
    refused(tmp_path, "a folder; name the ONNX file in it")


def test_the_description_is_read_without_torch_and_without_onnx_at_import():
    code = "import sys, export.artifact; print(sorted({'torch', 'onnx', 'onnxruntime', 'tvm'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_file_loads_where_torch_is_not_installed(exported):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from export.artifact import load_exported; print(load_exported(sys.argv[1]).opset)"
    )
    command = [sys.executable, "-c", code, str(exported.path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.fullmatch("23\n", done.stdout)
