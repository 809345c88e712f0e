"""How a file is called is read from its names and shapes, and a call without padding is made from ids alone."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from export.interface import plain_form, signature_of, with_shapes
from export.signature import Signature, tokens_to_try
from gpt.cli import UserError

PAST, PRESENT = "past_key_values.0.key", "present.0.key"
IDS = np.arange(6).reshape(2, 3)


@pytest.fixture
def proto(foreign_file, tmp_path):
    return onnx.load(foreign_file(tmp_path / "theirs.onnx"))


@pytest.fixture
def signature(proto):
    return signature_of(proto)


def interface(inputs, outputs):
    """A file of one node with inputs and outputs of those dtypes and shapes."""
    ports = [
        [helper.make_tensor_value_info(name, *about) for name, about in values.items()] for values in (inputs, outputs)
    ]
    graph = helper.make_graph([helper.make_node("Identity", [next(iter(inputs))], ["x"])], "", *ports)
    return signature_of(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]))


def test_names_say_what_inputs_are(signature):
    assert (signature.ids, signature.logits) == ("input_ids", "logits")
    assert signature.roles == {"attention_mask": "mask", "position_ids": "positions", PAST: "past"}
    assert signature.presents == {PAST: PRESENT}
    assert (signature.vocab_size, signature.longest) == (37, 16)
    assert signature.length_axis(PAST) == 2


def test_it_is_written_as_json_and_read_again(signature):
    assert Signature.from_json(signature.to_json()) == signature


def test_a_call_without_padding_sees_all_and_counts_on_from_the_past(signature):
    past = np.ones((2, 1, 4, 8), np.float32)
    given = signature.feed(IDS, {PAST: past})
    assert list(given) == ["input_ids", "attention_mask", "position_ids", PAST]
    np.testing.assert_array_equal(given["attention_mask"], np.ones((2, 7), np.int64))
    np.testing.assert_array_equal(given["position_ids"], [[4, 5, 6]] * 2)
    assert given[PAST] is past
    assert signature.feed(IDS)[PAST].shape == (2, 1, 0, 8)


def test_dtypes_are_the_files(foreign_file, tmp_path):
    narrow = signature_of(onnx.load(foreign_file(tmp_path / "theirs.onnx", ids=TensorProto.INT32)))
    assert narrow.feed(IDS)["input_ids"].dtype == np.int32


@pytest.mark.parametrize(
    ("inputs", "outputs", "presents"),
    [
        (["past_0", "past_1"], ["present_0", "present_1"], {"past_0": "present_0", "past_1": "present_1"}),
        (
            ["past_key_values.0.value", "past_key_values.0.key"],
            ["present.0.key", "present.0.value"],
            {"past_key_values.0.key": "present.0.key", "past_key_values.0.value": "present.0.value"},
        ),
        (["past_key_self_0"], ["present_key_self_0"], {"past_key_self_0": "present_key_self_0"}),
        (["past_0", "past_1"], ["present_0"], {}),
    ],
    ids=str,
)
def test_pasts_are_paired_with_presents(inputs, outputs, presents):
    about = TensorProto.FLOAT, ["b", 2, "p", 4]
    ids = {"input_ids": (TensorProto.INT64, ["b", "t"])}
    logits = {"logits": (TensorProto.FLOAT, ["b", "t", 9])}
    found = interface(ids | dict.fromkeys(inputs, about), logits | dict.fromkeys(outputs, about))
    assert found.presents == presents
    assert set(found.unknown) == (set() if presents else set(inputs))


def test_an_input_that_nobody_knows_is_named():
    inputs = {"input_ids": (TensorProto.INT64, ["b", "t"]), "pixels": (TensorProto.FLOAT, ["b", 3])}
    found = interface(inputs, {"logits": (TensorProto.FLOAT, ["b", "t", 9])})
    with pytest.raises(UserError, match="input pixels: nothing is known to give it"):
        found.feed(IDS)


def test_sizes_without_names_are_each_their_own():
    inputs = {"input_ids": (TensorProto.INT64, [None, None])}
    found = interface(inputs, {"logits": (TensorProto.FLOAT, [None, None, 9])})
    assert found.inputs[0].dims == ("input_ids.0", "input_ids.1")


def test_the_plain_form_computes_what_a_call_without_padding_does(proto, signature):
    plain = plain_form(proto, signature)
    onnx.checker.check_model(plain)
    assert [value.name for value in plain.graph.input] == ["input_ids", PAST]
    theirs, ours = (onnxruntime.InferenceSession(each.SerializeToString()) for each in (proto, plain))
    random = np.random.default_rng(0)
    for T, P in ((1, 0), (3, 0), (1, 5), (4, 5)):
        past = random.standard_normal((2, 1, P, 8), np.float32)
        given = signature.feed(random.integers(0, 37, (2, T)), {PAST: past})
        expected = theirs.run(None, given)
        found = ours.run(None, {name: given[name] for name in ("input_ids", PAST)})
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_file_of_ids_alone_has_no_other_form(foreign_file, tmp_path):
    proto = onnx.load(foreign_file(tmp_path / "theirs.onnx", ("input_ids",)))
    assert plain_form(proto, signature_of(proto)) is None


def test_a_shape_is_fixed_wherever_its_sizes_stand(proto):
    with_shapes(proto, {"input_ids": (2, 3)})
    fixed = signature_of(proto)
    assert fixed.input("input_ids").dims == (2, 3)
    assert fixed.input(PAST).dims == (2, 1, "past", 8)
    assert fixed.outputs[0].dims == (2, 3, 37)
    assert tokens_to_try(fixed, 11) == 3


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"ids": (1, 2)}, "--shapes ids: no input of the file, which has input_ids, "),
        ({"input_ids": (1,)}, "--shapes input_ids=1: must have 2 numbers, for bxt"),
        ({"input_ids": (1, 2), "position_ids": (1, 3)}, "t is 2 and not 3"),
        ({PAST: (1, 2, 3, 8)}, "1 is 1 and not 2"),
    ],
    ids=str,
)
def test_a_shape_that_the_file_cannot_have_is_refused(proto, shapes, message):
    with pytest.raises(UserError, match=message):
        with_shapes(proto, shapes)
