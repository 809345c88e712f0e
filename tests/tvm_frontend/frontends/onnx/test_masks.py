"""Masks that a file computes or holds: only those that are causal for every T are taken to be so."""

import numpy as np
import onnx
import onnx.parser
import pytest
import tvm
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from tvm import relax

from tvm_frontend.frontends.onnx.importer import import_onnx
from tvm_frontend.frontends.onnx.operators.masks import HIDE_LATER, HIDE_LATER_BY
from tvm_frontend.frontends.onnx.operators.symbolic import band
from tvm_frontend.options import CompileOptions
from tvm_frontend.pipeline import compile_graph
from tvm_frontend.target import resolve_target

LENGTHS = (1, 2, 7, 8, 9, 33, 64)
HEAD = """
<ir_version: 10, opset_import: ["" : 20]>
f (float[B,2,T,6] q) => (float[B,2,T,6] y, float[D0,D1] m)
<int64 zero = {0}, int64 one = {1}, int64[1] zeros = {0}, int64[1] ones = {1}, int64 two = {2}, int64[2] inner = {1, 2},
 float nothing = {0}, float low = {LOW}, int64 w = {WIDTH}, int64 a = {A}, int64 b = {B}>
{
    T1 = Shape <start = 2, end = 3> (q)
    TT = Concat <axis = 0> (T1, T1)
    length = Squeeze (T1)
    places = Range (zero, length, one)
    i = Unsqueeze (places, ones)
    j = Unsqueeze (places, zeros)
    distance = Sub (i, j)
    before = Add (distance, one)
"""
TAIL = """
    kt = Transpose <perm = [0, 1, 3, 2]> (q)
    scores = MatMul (q, kt)
    weights = Softmax <axis = -1> (masked)
    y = MatMul (weights, q)
}
"""
# Each gives `seen`, of which the mask is made; those of the first kind are causal, for every T.
CAUSAL = {
    "key at most query": "seen = LessOrEqual (j, i)",
    "no later key": "later = Greater (j, i)\nseen = Not (later)",
    "a distance of at least 0": "seen = GreaterOrEqual (distance, zero)",
    "a distance above -1": "seen = Greater (before, zero)",
    "a triangle": "square = ConstantOfShape <value = float[1] {1}> (TT)\ntri = Trilu <upper = 0> (square)\n"
    "seen = Greater (tri, nothing)",
    "no upper triangle": "square = ConstantOfShape <value = float[1] {1}> (TT)\ntri = Trilu <upper = 1> (square, one)\n"
    "seen = Equal (tri, nothing)",
    "causal twice": "c = LessOrEqual (j, i)\nd = GreaterOrEqual (distance, zero)\nseen = And (c, d)",
}
OTHERS = {
    "a window": "c = LessOrEqual (j, i)\nd = Less (distance, w)\nseen = And (c, d)",
    "a window both ways": "d = Less (distance, w)\ne = Sub (zero, w)\nf = Greater (distance, e)\nseen = And (d, f)",
    "a prefix": "c = LessOrEqual (j, i)\nd = Less (j, w)\nseen = Or (c, d)",
    "blocks": "r = Div (i, w)\ns = Div (j, w)\nseen = Equal (r, s)",
    "causal between blocks": "r = Div (i, w)\ns = Div (j, w)\nseen = LessOrEqual (s, r)",
    "one key more": "c = LessOrEqual (j, i)\nd = Equal (i, a)\ne = Equal (j, b)\nf = And (d, e)\nseen = Or (c, f)",
    "one key less": "c = LessOrEqual (j, i)\nd = Equal (i, b)\ne = Equal (j, a)\nf = And (d, e)\ng = Not (f)\n"
    "seen = And (c, g)",
    "one query that sees all": "c = LessOrEqual (j, i)\nd = Equal (i, a)\nseen = Or (c, d)",
    "a first key for all": "c = LessOrEqual (j, i)\nd = Equal (j, b)\nseen = Or (c, d)",
    "shifted": "c = Add (i, w)\nseen = LessOrEqual (j, c)",
    "causal up to a length": "c = LessOrEqual (j, i)\nd = Greater (i, w)\nseen = Or (c, d)",
    "a head that sees all": "heads = Range (zero, two, one)\nh = Unsqueeze (heads, inner)\nc = LessOrEqual (j, i)\n"
    "d = Equal (h, one)\nseen = Or (c, d)",
    "all": "c = Equal (j, j)\nd = Equal (i, i)\nseen = And (c, d)",
    "the other triangle": "seen = GreaterOrEqual (j, i)",
}
# What is added as each is, with a slope for each head, as ALiBi does.
SLOPES = """
    seen = LessOrEqual (j, i)
    heads = Range (one, three, one)
    h = Unsqueeze (heads, inner)
    product = Mul (distance, h)
    real = Cast <to = 1> (product)
    slopes = Mul (real, tenth)
    m = Where (seen, slopes, low)
    masked = Add (m, scores)
"""
WAYS = {
    "added": "m = Where (seen, nothing, low)\nmasked = Add (m, scores)",
    "chosen": "masked = Where (seen, scores, low)\nm = Where (seen, nothing, low)",
}


def graph(seen, way="added", low="-3.4e38", width=5, a=3, b=6):
    head = HEAD.replace("LOW", low).replace("WIDTH", str(width)).replace("A}", f"{a}}}").replace("{B}", f"{{{b}}}")
    before, *after = TAIL.split("    weights")
    return onnx.parser.parse_model(f"{head}{seen}\n{before}{WAYS[way]}\n    weights{after[0]}")


def with_slopes():
    head = HEAD.replace("int64 two", "int64 three = {3}, float tenth = {-0.1}, int64 two")
    head = head.replace("LOW", "-3e38").replace("WIDTH", "1").replace("A}", "0}").replace("{B}", "{0}")
    before, after = TAIL.split("    weights")
    return onnx.parser.parse_model(f"{head}{before}{SLOPES}\n    weights{after}")


def found(proto):
    """The kernel that hides later keys in the imported file, None if its mask was not taken to be causal."""
    names = [name.name_hint for name in import_onnx(proto).module.get_global_vars()]
    return next((name for name in names if name.startswith(HIDE_LATER)), None)


def is_causal_in_fact(proto, lengths):
    for T in lengths:
        _, mask = ReferenceEvaluator(proto).run(None, {"q": np.zeros((1, 2, T, 6), "float32")})
        if not np.array_equal(mask == 0, np.broadcast_to(np.tri(T, dtype=bool), mask.shape)):
            return False
    return True


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_mask_is_known(name, way):
    proto = graph(CAUSAL[name], way)
    assert is_causal_in_fact(proto, LENGTHS)
    assert found(proto) == HIDE_LATER


@pytest.mark.parametrize("name", OTHERS)
def test_a_mask_that_is_not_causal_for_every_length_is_not(name):
    random = np.random.default_rng(len(name))
    for _ in range(6):
        width, b = (int(number) for number in random.integers(1, 40, 2))
        proto = graph(OTHERS[name], width=width, a=int(random.integers(0, b)), b=b)
        # Not even one that is causal up to a constant in it, as a wide window or a far prefix.
        assert not is_causal_in_fact(proto, (*LENGTHS, width, width + 1, width + 2, b + 1, b + 2))
        assert found(proto) is None


def test_slopes_are_no_mask():
    assert found(with_slopes()) is None


@pytest.mark.parametrize(
    ("low", "kernel"),
    [
        ("-inf", HIDE_LATER),
        ("-1e30", HIDE_LATER),
        ("-65504", f"{HIDE_LATER_BY}65504_"),
        ("-10000", f"{HIDE_LATER_BY}10000_"),
        ("-9999", None),
        ("-10", None),
        ("0", None),
        ("3.4e38", None),
    ],
)
def test_how_far_down_a_key_is_hidden(low, kernel):
    proto = graph(CAUSAL["key at most query"], low="-1" if low == "-inf" else low)
    if low == "-inf":  # which the parser does not read
        index = [each.name for each in proto.graph.initializer].index("low")
        proto.graph.initializer[index].CopyFrom(numpy_helper.from_array(np.float32(-np.inf), "low"))
    assert found(proto) == kernel


@pytest.mark.slow
def test_values_are_those_of_the_file_whatever_the_mask():
    target = resolve_target()
    random = np.random.default_rng(0)
    for names in (list(OTHERS)[:7], list(OTHERS)[7:], ["key at most query"]):
        more = [with_slopes()] if len(names) == 1 else []
        protos = more + [
            graph((OTHERS | CAUSAL)[name], ("added", "chosen")[n % 2], "-3e4") for n, name in enumerate(names)
        ]
        joined = protos[0]
        for number, proto in enumerate(protos[1:]):
            joined = onnx.compose.merge_models(joined, onnx.compose.add_prefix(proto, f"p{number}_"), io_map=[])
        made = compile_graph(lambda joined=joined: import_onnx(joined), target, CompileOptions(opt_level=3))
        forward = relax.VirtualMachine(made.executable, tvm.cpu())["forward"]
        weights = [tvm.runtime.tensor(array) for array in made.graph.weights.values()]
        for T in (1, 2, 7, 33):
            q = random.normal(size=(2, 2, T, 6)).astype("float32")
            expected = ReferenceEvaluator(joined).run(None, {value.name: q for value in joined.graph.input})
            got = forward(*[tvm.runtime.tensor(q)] * len(joined.graph.input), weights)
            for left, right in zip(got, expected, strict=True):
                np.testing.assert_allclose(left.numpy(), right, rtol=1e-5, atol=1e-5)


BUFFER = """
<ir_version: 10, opset_import: ["" : 20]>
f (float[B,2,T,6] q) => (float[B,2,T,6] y)
<int64[1] axis2 = {2}, int64[1] axis3 = {3}, int64[1] zeros = {0}, int64[1] ones = {1}, float nothing = {0},
 float low = {-3.4e38}>
{
    T1 = Shape <start = 2, end = 3> (q)
    rows = Slice (buffer, zeros, T1, axis2, ones)
    cut = Slice (rows, zeros, T1, axis3, ones)
    kt = Transpose <perm = [0, 1, 3, 2]> (q)
    scores = MatMul (q, kt)
    MASKED
    weights = Softmax <axis = -1> (masked)
    y = MatMul (weights, q)
}
"""
USES = {
    "bool": "masked = Where (cut, scores, low)",
    "float32": "later = Equal (cut, nothing)\nmasked = Where (later, low, scores)",
    "uint8": "seen = Cast <to = 9> (cut)\nmasked = Where (seen, scores, low)",
}


def with_buffer(array):
    """A file that slices its mask out of an array, as GPT-2's of transformers and nanoGPT do."""
    proto = onnx.parser.parse_model(BUFFER.replace("MASKED", USES[str(array.dtype)]))
    proto.graph.initializer.append(numpy_helper.from_array(array, "buffer"))
    return proto


@pytest.mark.parametrize("dtype", USES)
def test_a_mask_that_is_sliced_out_of_a_buffer_is_known(dtype):
    assert found(with_buffer(np.tri(40, dtype=dtype)[None, None])) == HIDE_LATER


def test_a_buffer_is_compared_in_all_its_places():
    causal = np.tri(40, dtype=bool)
    for case in range(20):
        random = np.random.default_rng(case)
        broken = causal.copy()
        broken[tuple(random.integers(0, 40, 2))] ^= True
        assert found(with_buffer(broken[None, None])) is None
    assert found(with_buffer((causal ^ np.tri(40, k=-30, dtype=bool))[None, None])) is None  # a window of 30
    assert found(with_buffer(np.broadcast_to(causal, (1, 2, 40, 40)).copy())) is None  # one a head


def test_a_band_is_as_it_was():
    distance = np.arange(9)[:, None] - np.arange(9)
    for first, last in [(0, 8), (-8, 0), (0, 3), (-2, 3), (-1, 8), (0, 0), (-8, 7)]:
        for array in ((first <= distance) & (distance <= last), ~((first <= distance) & (distance <= last))):
            formula = band(array[None])
            values = [[tvm.sym.Analyzer().simplify(formula.at(0, i, j)) for j in range(9)] for i in range(9)]
            np.testing.assert_array_equal(np.array(values, dtype=object).astype(int).astype(bool), array)


def test_arrays_of_other_kinds_are_no_bands():
    random = np.random.default_rng(0)
    two_bands = np.eye(9) + np.eye(9, k=3)
    three = np.tri(9) + np.tri(9, k=-4)
    for array in (np.ones((4, 4)), np.tri(3, 4), np.ones((1, 1)), np.zeros(4), random.random((5, 5)), two_bands, three):
        assert band(array) is None
