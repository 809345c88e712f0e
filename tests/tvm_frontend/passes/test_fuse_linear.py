import numpy as np
import pytest
import tvm
from tvm.relax import op

from tvm_frontend.passes.fuse_linear import fuse_linear

B, T = tvm.tirx.Var("B", "int64"), tvm.tirx.Var("T", "int64")
K, N = 12, 20
X, R = {"x": ((B, T, K), "float32")}, {"r": ((B, T, N), "float32")}


def normal(*shape):
    return np.random.default_rng(shape).normal(size=shape).astype("float32")


W, BIAS = {"w": normal(K, N)}, {"bias": normal(N)}


def product(emit, x, w):
    return emit(op.matmul(x, w))


FORMS = {
    "linear": (product, X, W),
    "linear, transposed": (lambda emit, x, w: product(emit, x, emit(op.permute_dims(w))), X, {"w": normal(N, K)}),
    "linear, bias": (lambda emit, x, w, bias: op.add(product(emit, x, w), bias), X, W | BIAS),
    "linear, bias first": (lambda emit, x, w, bias: op.add(bias, product(emit, x, w)), X, W | BIAS),
    "linear_gelu_tanh": (lambda emit, x, w: op.nn.gelu_tanh(product(emit, x, w)), X, W),
    "linear_gelu_tanh, bias": (
        lambda emit, x, w, bias: op.nn.gelu_tanh(emit(op.add(product(emit, x, w), bias))),
        X,
        W | BIAS,
    ),
    "linear_gelu, bias": (lambda emit, x, w, bias: op.nn.gelu(emit(op.add(product(emit, x, w), bias))), X, W | BIAS),
    "linear_gelu": (lambda emit, x, w: op.nn.gelu(product(emit, x, w)), X, W),
    "linear_relu, bias": (lambda emit, x, w, bias: op.nn.relu(emit(op.add(product(emit, x, w), bias))), X, W | BIAS),
    "linear_residual": (lambda emit, x, r, w: op.add(product(emit, x, w), r), X | R, W),
    "linear_residual, bias": (
        lambda emit, x, r, w, bias: op.add(emit(op.add(product(emit, x, w), bias)), r),
        X | R,
        W | BIAS,
    ),
    "linear_residual, bias, residual first": (
        lambda emit, x, r, w, bias: op.add(r, emit(op.add(product(emit, x, w), bias))),
        X | R,
        W | BIAS,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_each_form_becomes_one_kernel_of_the_same_meaning(graph_of, calls, kernels, rewritten, form):
    before = graph_of(*FORMS[form])
    after = fuse_linear(before, kernels)
    assert calls(after) == {form.split(",")[0]: 1}
    inputs = [normal(3, 5, int(dims[2])) for dims, _ in FORMS[form][1].values()]
    rewritten(before, after, inputs)


ALONE = {
    "a weight that is computed": (lambda emit, x, v: op.matmul(x, v), X | {"v": ((K, N), "float32")}, {}),
    "a product with itself": (lambda emit, x: op.matmul(x, emit(op.permute_dims(x, [0, 2, 1]))), X, {}),
    "a batch of weights": (lambda emit, x, w: op.matmul(x, w), {"x": ((3, T, K), "float32")}, {"w": normal(3, K, N)}),
    "a weight whose axes stay in their order": (
        lambda emit, x, w: op.matmul(x, emit(op.permute_dims(w, [0, 1]))),
        X,
        {"w": normal(K, K)},
    ),
    "a product of integers": (
        lambda emit, x, w: op.matmul(x, w),
        {"x": ((B, T, K), "int32")},
        {"w": np.ones((K, N), "int32")},
    ),
}


@pytest.mark.parametrize("dims", [(T, K), (B, 2, T, K)])
def test_rows_of_other_dimensions_are_rows_too(graph_of, calls, kernels, rewritten, dims):
    of_result = {"r": ((*dims[:-1], N), "float32")}
    before = graph_of(FORMS["linear_residual, bias"][0], {"x": (dims, "float32")} | of_result, W | BIAS)
    after = fuse_linear(before, kernels)
    assert calls(after) == {"linear_residual": 1, "relax.reshape": 3}
    sizes = [{B: 3, T: 5}.get(dim, dim) for dim in dims[:-1]]
    rewritten(before, after, [normal(*sizes, K), normal(*sizes, N)])


@pytest.mark.parametrize("case", ALONE)
def test_other_products_stay(graph_of, calls, kernels, case):
    before = graph_of(*ALONE[case])
    assert calls(fuse_linear(before, kernels)) == calls(before)


ADDENDS = {
    "a row for all": {"r": ((1, 1, N), "float32")},
    "a row a position": {"r": ((1, T, N), "float32")},
    "a bias that is computed": {"r": ((N,), "float32")},
}


@pytest.mark.parametrize("case", ADDENDS)
def test_an_addend_of_another_shape_is_no_residual(graph_of, calls, kernels, rewritten, case):
    before = graph_of(FORMS["linear_residual"][0], X | ADDENDS[case], W)
    after = fuse_linear(before, kernels)
    assert calls(after) == {"linear": 1, "relax.add": 1}
    shape = [5 if dim is T else int(dim) for dim in ADDENDS[case]["r"][0]]
    rewritten(before, after, [normal(3, 5, K), normal(*shape)])


@pytest.mark.parametrize("shape", [(1,), (1, N), (1, 1, N)])
def test_a_constant_addend_of_another_shape_is_no_bias(graph_of, calls, kernels, rewritten, shape):
    before = graph_of(FORMS["linear, bias"][0], X, W | {"bias": normal(*shape)})
    after = fuse_linear(before, kernels)
    assert calls(after) == {"linear": 1, "relax.add": 1}
    rewritten(before, after, [normal(3, 5, K)])


@pytest.mark.slow
def test_a_result_that_something_else_reads_too_is_still_there(graph_of, calls, kernels, rewritten):
    def body(emit, x, w, bias):
        linear = emit(op.add(product(emit, x, w), bias))
        return op.multiply(emit(op.nn.gelu_tanh(linear)), linear)

    before = graph_of(body, X, W | BIAS)
    after = fuse_linear(before, kernels)
    assert calls(after) == {"linear": 1, "linear_gelu_tanh": 1, "relax.multiply": 1}
    rewritten(before, after, [normal(3, 5, K)])


def test_one_weight_read_both_ways_is_packed_both_ways(graph_of, calls, kernels, rewritten):
    def body(emit, x, w):
        return op.matmul(product(emit, x, w), emit(op.permute_dims(w)))

    before = graph_of(body, X, {"w": normal(K, K)})
    after = fuse_linear(before, kernels)
    assert calls(after) == {"linear": 2}
    rewritten(before, after, [normal(3, 5, K)])


def test_what_is_packed_replaces_the_weight(graph_of, kernels):
    after = fuse_linear(graph_of(*FORMS["linear, bias"]), kernels)
    packed = kernels.pack_weight(W["w"])
    assert sorted(after.weights) == ["w.bias.table", "w.packed"]
    np.testing.assert_array_equal(after.weights["w.packed"], packed)
    assert [list(map(int, var.ty.shape.values)) for var in after.module["forward"].params[1:]] == [
        list(array.shape) for array in after.weights.values()
    ]
