import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
import tvm
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from tvm import relax

from gpt.cli import UserError
from tvm_frontend.frontends.onnx import operators
from tvm_frontend.frontends.onnx.importer import import_onnx
from tvm_frontend.options import CompileOptions
from tvm_frontend.pipeline import compile_graph
from tvm_frontend.target import resolve_target

TARGET = resolve_target()


def model(nodes, inputs, output, weights=(), opset=23, domains=()):
    """An ONNX model; inputs and output: {name: dims}, float32."""
    declared = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)
        for name, dims in {**inputs, **output}.items()
    }
    graph = helper.make_graph(
        nodes,
        "graph",
        [declared[name] for name in inputs],
        [declared[name] for name in output],
        [numpy_helper.from_array(array, name) for name, array in dict(weights).items()],
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def node(op, inputs, outputs=("y",), **attributes):
    return helper.make_node(op, list(inputs), list(outputs), name=f"the_{op}", **attributes)


def compiled(proto):
    executable = compile_graph(lambda: import_onnx(proto), TARGET, CompileOptions(opt_level=0))
    forward = relax.VirtualMachine(executable.executable, tvm.cpu())["forward"]
    weights = [tvm.runtime.tensor(array) for array in executable.graph.weights.values()]
    return lambda array: forward(tvm.runtime.tensor(array), weights).numpy()


def in_onnxruntime(proto, array):
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: array})[0]


@pytest.mark.slow
def test_a_gpt_without_any_rewrite_gives_onnxruntimes_numbers(exported):
    proto = onnx.load(exported.path)
    forward = compiled(proto)
    for B, T in [(1, 1), (3, 17), (1, exported.config.block_size)]:
        ids = np.random.default_rng(0).integers(0, exported.config.vocab_size, (B, T))
        # Both in float32, in another order: logits up to 3, some hundred roundings of 6e-8.
        np.testing.assert_allclose(forward(ids), in_onnxruntime(proto, ids), rtol=0, atol=2e-5)


def test_dimensions_named_in_the_file_stay_symbols(exported):
    graph = import_onnx(onnx.load(exported.path))
    function = graph.module["forward"]
    B, T = function.params[0].ty.shape.values
    assert (B.name, T.name) == ("B", "T")
    out_B, out_T, V = function.ret_ty.shape.values
    assert out_B.same_as(B)
    assert out_T.same_as(T)
    assert int(V) == exported.config.vocab_size


def test_floats_become_parameters_and_index_arithmetic_none(exported, calls):
    graph = import_onnx(onnx.load(exported.path))
    assert len(graph.module["forward"].params) == 1 + len(graph.weights)
    assert all(array.dtype == np.float32 for array in graph.weights.values())
    assert not [name for name in calls(graph) if name in {"relax.shape_of", "relax.concat", "relax.squeeze"}]


def of_branches(rows):
    """A graph that squeezes x [rows, 4] if that can be done, as TorchScript's exporter writes it."""
    value = {"y": helper.make_empty_tensor_value_info("y")}
    branches = {
        "then_branch": helper.make_graph([node("Squeeze", ["x", "zeros"], ["then"])], "then", [], [value["y"]]),
        "else_branch": helper.make_graph([node("Identity", "x", ["else"])], "else", [], [value["y"]]),
    }
    for name, branch in branches.items():
        branch.output[0].name = name.split("_")[0]
    nodes = [
        node("Shape", "x", "s"),
        node("Gather", ["s", "zero"], "n"),
        node("Equal", ["n", "one"], "c"),
        node("If", "c", **branches),
    ]
    weights = {"zero": np.array(0), "one": np.array(1), "zeros": np.array([0])}
    return model(nodes, {"x": [rows, 4]}, {"y": None}, weights)


UNSUPPORTED = {
    "another domain": (
        model([node("Gelu", "x", domain="org.example")], {"x": ["T"]}, {"y": ["T"]}, domains=["org.example"]),
        r"node 'the_Gelu': operator Gelu of domain org\.example \(opset 1\) is not supported",
    ),
    "another operator": (
        model([node("Det", "x", "z"), node("LRN", "z", size=3)], {"x": ["T"]}, {"y": ["T"]}),
        r"node 'the_Det': operator Det of domain ai\.onnx \(opset 23\) is not supported; node 'the_LRN': operator LRN",
    ),
    "an old opset": (model([node("Add", "xx")], {"x": ["T"]}, {"y": ["T"]}, opset=10), "opset 10: supported are 11 to"),
    "a new opset": (model([node("Add", "xx")], {"x": ["T"]}, {"y": ["T"]}, opset=26), "opset 26: supported are 11 to"),
    "LayerNormalization's mean": (
        model(
            [node("LayerNormalization", "xg", ["y", "mean"])], {"x": ["T", 4]}, {"y": ["T", 4]}, {"g": np.ones(4, "f")}
        ),
        r"node 'the_LayerNormalization' \(LayerNormalization, ai\.onnx opset 23\): outputs y, mean",
    ),
    "a shape that is only known when it runs": (
        model([node("Reshape", "xs")], {"x": ["T"], "s": [1]}, {"y": ["T"]}),
        "node 'the_Reshape'.*'s' is a tensor where a shape, known while compiling, is needed",
    ),
    "a length that is only known when it runs": (
        model([node("NonZero", "x")], {"x": ["T"]}, {"y": [1, "n"]}),
        "node 'the_NonZero'.*depends on numbers that are only known when it runs",
    ),
    "a branch that is only known when it runs": (
        of_branches("B"),
        "node 'the_If'.*which branch is taken is only known when it runs",
    ),
    "another axis than there is": (
        model([node("Softmax", "x", axis=2)], {"x": ["T", 4]}, {"y": ["T", 4]}),
        "node 'the_Softmax'.*axis 2 of 2 dimensions",
    ),
    "sizes that differ": (
        model([node("Add", ["x", "w"])], {"x": ["T", 4]}, {"y": ["T", 4]}, {"w": np.ones((2, 5), "f")}),
        "node 'the_Add'.*sizes 4 and 5 differ",
    ),
    "halves of any number": (
        model([node("Reshape", "xs")], {"x": ["T"]}, {"y": ["n", 2]}, {"s": np.array([-1, 2])}),
        "node 'the_Reshape'.*in rows of 2: whether they are whole is only known when it runs",
    ),
    "what TVM refuses": (
        model([node("Where", "xxx")], {"x": ["T"]}, {"y": ["T"]}),
        "node 'the_Where'.*TVM cannot make it: Where requires the input condition",
    ),
    "a result that is not there": (
        model([node("Add", "xq")], {"x": ["T"]}, {"y": ["T"]}),
        "node 'the_Add' .Add. reads 'q', which is no input, no weight and no result of a node before it",
    ),
    "an attribute that is missing": (
        model([node("Concat", "xx")], {"x": ["T"]}, {"y": ["n"]}),
        "node 'the_Concat'.*attribute axis is missing",
    ),
    "an attribute of another type": (
        model([node("Softmax", "x", axis=1.0)], {"x": ["T", 4]}, {"y": ["T", 4]}),
        "node 'the_Softmax'.*attribute axis is of another type than INT",
    ),
    "too few inputs": (
        model([node("Add", "x")], {"x": ["T"]}, {"y": ["T"]}),
        "node 'the_Add'.*1 inputs, where 2 to 2 are legal",
    ),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_is_not_supported_is_named(case):
    proto, said = UNSUPPORTED[case]
    with pytest.raises(UserError, match=said) as caught:
        import_onnx(proto)
    assert "\n" not in str(caught.value)


CAUSAL = """
<ir_version: 10, opset_import: ["" : 23]>
f (float[B,2,T,8] x) => (float[B,2,T,8] y)
<int64 zero = {0}, int64 one = {1}, int64[1] zeros = {0}, int64[1] ones = {1}>
{
    T1 = Shape <start = 2, end = 3> (x)
    T = Squeeze (T1)
    places = Range (zero, T, one)
    key = Unsqueeze (places, zeros)
    query = Unsqueeze (places, ones)
    seen = LessOrEqual (key, query)
    y = Attention (x, x, x, seen)
}
"""


def attention(inputs="qkv", heads=2, outputs=("y",), opset=23, **attributes):
    """A graph with one Attention of the same x as q, k and v, or with more inputs."""
    nodes = [node("Attention", ["x" if name in "qkv" else name for name in inputs], outputs, **attributes)]
    shape = ["B", heads, "T", 8]
    return model(nodes, {"x": shape, "m": ["T", "T"]}, {"y": shape}, opset=opset)


@pytest.mark.parametrize(
    ("proto", "said"),
    [
        (attention("qkvmx", is_causal=1), "past_key is not supported without past_value"),
        (attention(["q", "k", "v", "", "x", "x", "m"], opset=24), "nor beside nonpad_kv_seqlen"),
        (attention(softmax_precision=7), "softmax_precision=7 is not supported, only floats"),
        (attention("qkm"), "q, k, v of 4, 4, 2 dimensions"),
        (
            model([node("Attention", "xxx", q_num_heads=3, kv_num_heads=2)], {"x": ["B", "T", 8]}, {"y": []}),
            "3 heads of 8 channels",
        ),
        (
            model([node("Attention", "xkk")], {"x": ["B", 4, "T", 8], "k": ["B", 3, "T", 8]}, {"y": []}),
            "4 heads of queries for 3 of keys",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_attention_that_onnx_does_not_define_is_refused(proto, said):
    with pytest.raises(UserError, match=rf"node 'the_Attention' \(Attention, ai\.onnx opset 2[34]\): .*{said}"):
        import_onnx(proto)


# Keys are those of x, of 2 heads, after P of the past; masks are of the batch, of each head, and of the keys alone.
ATTENTIONS = """
<ir_version: 10, opset_import: ["" : 24]>
f (float[B,4,T,8] q, float[B,2,T,8] k, float[B,2,P,8] past, bool[B,1,T,S] mask, float[4,T,S] bias, int64[B] filled)
  => (float[B,4,T,8] a, float[B,4,T,8] b, float[B,4,T,8] c, float[B,4,T,8] d, float[B,2,S,8] keys)
{
    a, keys, values = Attention <is_causal = 1> (q, k, k, , past, past)
    b, keys2, values2 = Attention <is_causal = 1, softcap = 2.0> (q, k, k, mask, past, past)
    c, keys3, values3 = Attention (q, k, k, bias, past, past)
    d = Attention <is_causal = 1> (q, keys, values, , , , filled)
}
"""


# The keys are twice as many as the queries, and a mask shows each query those up to T places behind its own position;
# is_causal and windows count a query's position from the first key.
TWICE = """
<ir_version: 10, opset_import: ["" : 25]>
f (float[B,2,T,8] x) => (float[B,2,T,8] a, float[B,2,T,8] b, float[B,2,T,8] c)
<int64 zero = {0}, int64 one = {1}, int64[1] zeros = {0}, int64[1] ones = {1}>
{
    T1 = Shape <start = 2, end = 3> (x)
    T = Squeeze (T1)
    S = Add (T, T)
    queries = Range (T, S, one)
    places = Range (zero, S, one)
    key = Unsqueeze (places, zeros)
    query = Unsqueeze (queries, ones)
    seen = LessOrEqual (key, query)
    keys = Concat <axis = 2> (x, x)
    a = Attention (x, keys, keys, seen)
    b = Attention <is_causal = 1> (x, keys, keys, seen)
    c = Attention <left_window_size = 1> (x, keys, keys, seen)
}
"""


@pytest.mark.slow
def test_a_causal_mask_of_more_keys_than_queries_is_not_what_is_causal_says():
    proto = onnx.parser.parse_model(TWICE)
    made = compile_graph(lambda: import_onnx(proto), TARGET, CompileOptions(opt_level=0))
    forward = relax.VirtualMachine(made.executable, tvm.cpu())["forward"]
    for T in (1, 2, 7):
        x = np.random.default_rng(T).normal(size=(2, 2, T, 8)).astype("float32")
        expected = ReferenceEvaluator(proto).run(None, {"x": x})
        for found, wanted in zip(forward(tvm.runtime.tensor(x), []), expected, strict=True):
            np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.slow
def test_one_attention_serves_every_batch_length_and_past():
    proto = onnx.parser.parse_model(ATTENTIONS)
    made = compile_graph(lambda: import_onnx(proto), TARGET, CompileOptions(opt_level=3))
    forward = relax.VirtualMachine(made.executable, tvm.cpu())["forward"]
    for B, T, P in [(1, 1, 0), (1, 1, 4), (2, 7, 0), (3, 5, 9), (2, 1, 33)]:
        random, S = np.random.default_rng([B, T, P]), P + T
        shapes = {"q": (B, 4, T, 8), "k": (B, 2, T, 8), "past": (B, 2, P, 8)}
        feeds = {name: random.normal(size=shape).astype("float32") for name, shape in shapes.items()}
        feeds["mask"] = random.integers(0, 2, (B, 1, T, S)).astype(bool)
        feeds["bias"] = np.where(random.integers(0, 2, (4, T, S)), random.normal(size=(4, T, S)), -np.inf).astype("f")
        feeds["filled"] = random.integers(0, S + 1, B)
        expected = ReferenceEvaluator(proto).run(None, feeds)
        found = forward(*(tvm.runtime.tensor(feeds[value.name]) for value in proto.graph.input), [])
        for left, right in zip(found, expected, strict=True):
            np.testing.assert_allclose(left.numpy(), right, rtol=1e-5, atol=2e-6)


SMALL = {
    "a causal mask of Attention": onnx.parser.parse_model(CAUSAL),
    "attention with a scale": attention(is_causal=1, scale=0.9),
    "LayerNormalization without bias": model(
        [node("LayerNormalization", "xg", epsilon=0.3)],
        {"x": ["B", 2, "T", 8]},
        {"y": ["B", 2, "T", 8]},
        {"g": np.linspace(-1, 1, 8, dtype="float32")},
    ),
    "exact GELU": model([node("Gelu", "x")], {"x": ["B", 2, "T", 8]}, {"y": ["B", 2, "T", 8]}),
    "tanh GELU": model([node("Gelu", "x", approximate="tanh")], {"x": ["B", 2, "T", 8]}, {"y": ["B", 2, "T", 8]}),
    "ReLU": model([node("Relu", "x")], {"x": ["B", 2, "T", 8]}, {"y": ["B", 2, "T", 8]}),
    "a transpose that reverses": model([node("Transpose", "x")], {"x": ["B", 2, "T", 8]}, {"y": [8, "T", 2, "B"]}),
    "a reshape that keeps and infers": model(
        [node("Reshape", "xs")], {"x": ["B", 2, "T", 8]}, {"y": ["B", 2, "n"]}, {"s": np.array([0, 2, -1])}
    ),
    "a split in unequal parts": model(
        [node("Split", "xs", ["a", "b", "c"], axis=-1), node("Concat", "cab", axis=3)],
        {"x": ["B", 2, "T", 8]},
        {"y": ["B", 2, "T", 8]},
        {"s": np.array([1, 5, 2])},
    ),
    "positions by Shape, Squeeze and Range": model(
        [
            node("Shape", "x", "n", start=2, end=3),
            node("Squeeze", "n", "m"),
            node("Range", ["zero", "m", "one"], "p"),
            node("Gather", "tp", "r"),
            node("Add", "xr"),
        ],
        {"x": ["B", 2, "T", 8]},
        {"y": ["B", 2, "T", 8]},
        {"zero": np.array(0), "one": np.array(1), "t": np.arange(160, dtype="float32").reshape(20, 8)},
    ),
}


def of(text):
    """A graph of x float32 [B, 2, T, 8], in ONNX's own language; z and k are 0 and 1, zs and ks lists of them."""
    head = '<ir_version: 10, opset_import: ["" : 20]> f (float[B,2,T,8] x) => (float[D0,D1,D2,D3] y)'
    numbers = "<int64 z = {0}, int64 k = {1}, int64[1] zs = {0}, int64[1] ks = {1}>"
    sizes = "B1 = Shape <start = 0, end = 1> (x) T1 = Shape <start = 2, end = 3> (x) T = Squeeze (T1) B = Squeeze (B1)"
    return onnx.parser.parse_model(f"{head} {numbers} {{ {sizes} {text} }}")


SMALL |= {
    "a triangle of what is computed": of("""
        TT = Concat <axis = 0> (ks, ks, T1, T1)
        filled = ConstantOfShape <value = float[1] {2.5}> (TT)
        below = Trilu <upper = 0> (filled, k)
        above = Trilu (filled)
        y = Sub (below, above)
    """),
    "products and quotients of sizes": of("""
        BT = Mul (B, T)
        again = Div (BT, B)
        places = Range (z, again, k)
        real = Cast <to = 1> (places)
        column = Unsqueeze (real, ks)
        y = Add (x, column)
    """),
    "places that are compared, chosen, joined and looked up": of("""
        places = Range (z, T, k)
        key = Unsqueeze (places, zs)
        query = Unsqueeze (places, ks)
        less = Sub (key, query)
        smaller = Min (key, query)
        far = Greater (less, k)
        near = Not (far)
        equal = Equal (key, query)
        either = Or (near, equal)
        chosen = Where (either, less, smaller)
        both = Concat <axis = 1> (chosen, chosen)
        cut = Slice (both, zs, T1, ks)
        rows = Unsqueeze (places, ks)
        swapped = Concat <axis = 1> (rows, rows)
        diagonal = GatherND (chosen, swapped)
        sum = Add (cut, diagonal)
        real = Cast <to = 1> (sum)
        outer = Unsqueeze (real, zs)
        y = Unsqueeze (outer, zs)
    """),
    "a number that is none": of("""
        zero = Sub (x, x)
        nan = Div (zero, zero)
        odd = IsNaN (nan)
        y = Where (odd, x, zero)
    """),
    "the exact GELU's curve": of("y = Erf (x)"),
    "softmax": of("y = Softmax <axis = 2> (x)"),
    "powers": of("""
        one = Cast <to = 1> (k)
        two = Add (one, one)
        three = Add (two, one)
        square = Pow (x, two)
        cube = Pow (x, three)
        y = Sub (cube, square)
    """),
    "sizes as a tensor": of("""
        n = Shape (x)
        twice = Add (n, n)
        y = Cast <to = 1> (twice)
    """),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", SMALL)
def test_each_operator_gives_onnxruntimes_numbers(case):
    proto = SMALL[case]
    if len(proto.graph.input) > 1:
        del proto.graph.input[1]  # the mask that this graph does not use
    x = np.random.default_rng(0).normal(size=(3, 2, 5, 8)).astype("float32")
    np.testing.assert_allclose(compiled(proto)(x), in_onnxruntime(proto, x), atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float", "double"])
def test_types_of_inputs_and_outputs_are_kept_where_asked(dtype):
    proto = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 23]>
        f ({dtype}[B,T] x, bool[B,T] seen, int32[B,T] i) => ({dtype}[B,T] y, int32[B,T] j, bool[B,T] seen)
        {{ y = Add (x, x)  j = Add (i, i) }}
    """)
    made = compile_graph(lambda: import_onnx(proto, keep_types=True), TARGET, CompileOptions(opt_level=0))
    forward = relax.VirtualMachine(made.executable, tvm.cpu())["forward"]
    numbers = np.arange(6).reshape(2, 3)
    kind = onnx.helper.tensor_dtype_to_np_dtype(proto.graph.input[0].type.tensor_type.elem_type)
    given = [numbers.astype(kind), numbers > 2, numbers.astype("int32")]
    y, j, seen = (each.numpy() for each in forward(*map(tvm.runtime.tensor, given), []))
    assert (y.dtype, j.dtype, seen.dtype) == (kind, np.int32, np.bool_)
    for found, wanted in ((y, 2 * numbers), (j, 2 * numbers), (seen, numbers > 2)):
        np.testing.assert_array_equal(found.astype("float64"), wanted)


@pytest.mark.parametrize(("rows", "wanted"), [(1, (4,)), (3, (3, 4))])
def test_a_branch_that_a_shape_decides_is_taken(rows, wanted):
    x = np.random.default_rng(0).normal(size=(rows, 4)).astype("float32")
    np.testing.assert_array_equal(compiled(of_branches(rows))(x), x.reshape(wanted))


def of_past(mask, shared="P", after="P + T"):
    """A graph that appends x to a past and adds a mask of the size that a file may name as it likes."""
    return onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 18]>
        f (float[B,T] x, float[B,{shared}] past, float[B,{mask}] m) => (float[B,"{after}"] y)
        {{ all = Concat <axis = 1> (past, x)  y = Add (all, m) }}
    """)


@pytest.mark.parametrize("mask", ["S", '"P + T"', '"past + 1"', "T"])
def test_a_size_that_follows_from_others_is_learnt(mask):
    """As total_sequence_length of optimum's files; the last one is a file whose names are wrong."""
    proto = of_past(mask)
    made = compile_graph(lambda: import_onnx(proto), TARGET, CompileOptions(opt_level=0))
    forward = relax.VirtualMachine(made.executable, tvm.cpu())["forward"]
    random = np.random.default_rng(0)
    for B, T, P in [(1, 1, 0), (2, 3, 4), (3, 5, 1)]:
        x, past, m = (random.normal(size=(B, size)).astype("float32") for size in (T, P, P + T))
        y = forward(*map(tvm.runtime.tensor, (x, past, m)), []).numpy()
        np.testing.assert_array_equal(y, np.concatenate([past, x], 1) + m)
    with pytest.raises(RuntimeError, match="shape"):  # and another size is none of this file
        forward(*(tvm.runtime.tensor(np.zeros((1, size), "float32")) for size in (2, 3, 4)), [])


def test_a_size_without_a_name_is_a_symbol_of_its_own():
    proto = of_past("S")
    for value in proto.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            dim.Clear()
    function = import_onnx(proto).module["forward"]
    x, past, m = (param.ty.shape.values for param in function.params)
    assert x[0].same_as(past[0])
    assert x[0].same_as(m[0])  # as they are joined
    assert tvm.sym.Analyzer().can_prove_equal(m[1], past[1] + x[1])


def test_a_table_limits_how_long_sequences_may_be():
    proto = onnx.parser.parse_model(
        """
        <ir_version: 10, opset_import: ["" : 18]>
        f (int64[B,T] ids, float[B,P] past) => (float[D0,D1] y)
        <float[8,4] table = {"""
        + ",".join("1" * 32)
        + """}, int64 zero = {0}, int64 one = {1}>
        {
            n = Shape <start = 1> (ids)
            T = Squeeze (n)
            p = Shape <start = 1> (past)
            P = Squeeze (p)
            end = Add (P, T)
            places = Range (P, end, one)
            y = Gather (table, places)
        }
    """
    )
    assert dict(import_onnx(proto).module["forward"].attrs["limits"]) == {"P + T": 8}


def test_a_constant_mask_cut_to_size_limits_it_too():
    proto = model(
        [node("Shape", "x", "n", start=1), node("Slice", ["w", "zs", "n", "ks"], "m"), node("Add", "xm")],
        {"x": ["B", "T"]},
        {"y": ["B", "T"]},
        {"w": np.random.default_rng(0).normal(size=(1, 9)).astype("float32"), "zs": np.array([0]), "ks": np.array([1])},
    )
    assert dict(import_onnx(proto).module["forward"].attrs["limits"]) == {"T": 9}
    x = np.zeros((2, 9), "float32")
    np.testing.assert_array_equal(compiled(proto)(x), in_onnxruntime(proto, x))


def test_files_of_older_kinds_are_read():
    """Weights that are inputs too, nodes in no order, an output that is an input, one twice, and a constant."""
    weight = numpy_helper.from_array(np.arange(4, dtype="float32"), "w")
    info = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 4]) for name in "xy"}
    graph = helper.make_graph(
        [
            helper.make_node("Relu", ["z"], ["y", ""][:1]),
            helper.make_node("Add", ["x", "w"], ["z"]),
            helper.make_node("Constant", [], ["c"], value_floats=[1.0, 2.0]),
        ],
        "graph",
        [info["x"], helper.make_tensor_value_info("w", TensorProto.FLOAT, [4])],
        [info["y"], info["x"], info["y"], helper.make_tensor_value_info("c", TensorProto.FLOAT, [2])],
        [weight],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=3)
    made = compile_graph(lambda: import_onnx(proto), TARGET, CompileOptions(opt_level=0))
    forward = relax.VirtualMachine(made.executable, tvm.cpu())["forward"]
    x = np.random.default_rng(0).normal(size=(3, 4)).astype("float32")
    weights = [tvm.runtime.tensor(array) for array in made.graph.weights.values()]
    found = [each.numpy() for each in forward(tvm.runtime.tensor(x), weights)]
    y = np.maximum(x + np.arange(4, dtype="float32"), 0)
    for left, right in zip(found, (y, x, y, np.array([1.0, 2.0], "float32")), strict=True):
        np.testing.assert_array_equal(left, right)


def test_functions_of_a_file_are_read():
    proto = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 20, "own" : 1]>
        f (float[B,4] x) => (float[B,4] y) { y = own.twice <by = 3.0> (x) }
        <domain: "own", opset_import: ["" : 20]>
        twice <by> (a) => (b) { k = Constant <value_float: float = @by> ()  c = Mul (a, k)  b = Add (c, c) }
    """)
    x = np.random.default_rng(0).normal(size=(3, 4)).astype("float32")
    np.testing.assert_allclose(compiled(proto)(x), 6 * x, rtol=1e-6)


def test_a_mistake_in_a_converter_stays_visible(monkeypatch):
    """Errors of TVM become a UserError, those of this project's own code do not."""
    monkeypatch.setitem(operators.CONVERTERS, "Relu", lambda reading, node, attributes: attributes.unknown)
    with pytest.raises(AttributeError, match="unknown"):
        import_onnx(model([node("Relu", "x")], {"x": ["T"]}, {"y": ["T"]}))
