import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from tvm_frontend.passes.recover_layer_norm import recover_layer_norm

B, T, C = tvm.tirx.Var("B", "int64"), tvm.tirx.Var("T", "int64"), 12
X = {"x": ((B, T, C), "float32")}


def const(number):
    return relax.const(np.float32(number))


def normal(*shape):
    return np.random.default_rng(shape).normal(size=shape).astype("float32")


WEIGHTS = {"gain": normal(C) + 1, "bias": normal(C)}


def spelt(axis=-1, keepdims=True, of=None, square=None, around=None, epsilon=1e-3, divide=None):
    """LayerNorm as torch.onnx writes it below opset 17, with a part exchanged."""

    def body(emit, x, gain, bias=None):
        mean = emit(op.mean(x, [axis], keepdims))
        deviation = emit(op.subtract(x, mean))
        other = deviation if of is None else of(emit, x, deviation)
        squared = emit((square or (lambda x: op.power(x, const(2))))(other))
        variance = emit(op.mean(squared, [axis if around is None else around], keepdims))
        root = emit(op.sqrt(emit(op.add(variance, const(epsilon)))))
        normalized = divide(emit, deviation, root) if divide else emit(op.divide(deviation, root))
        scaled = emit(op.multiply(normalized, gain))
        return scaled if bias is None else op.add(scaled, bias)

    return body


def inverse(emit, deviation, root):
    return emit(op.multiply(emit(op.divide(const(1), root)), deviation))


FORMS = {
    "as torch.onnx writes it": (spelt(), WEIGHTS),
    "over axis 2": (spelt(axis=2), WEIGHTS),
    "a product for the square": (spelt(square=lambda x: op.multiply(x, x)), WEIGHTS),
    "the deviation computed twice": (
        spelt(of=lambda emit, x, _: emit(op.subtract(x, emit(op.mean(x, [-1], True))))),
        WEIGHTS,
    ),
    "times the inverse": (spelt(divide=inverse), WEIGHTS),
    "no bias": (spelt(), {"gain": WEIGHTS["gain"]}),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_norm_that_is_spelt_out_is_one_operator(graph_of, calls, rewritten, form):
    body, weights = FORMS[form]
    before = graph_of(body, X, weights)
    after = recover_layer_norm(before)
    assert calls(after) == {"relax.nn.layer_norm": 1}
    rewritten(before, after, [3 * normal(2, 5, C) + 1])


LEFT_ALONE = {
    "over positions": (spelt(axis=1), WEIGHTS),
    "the variance over positions": (spelt(around=1), WEIGHTS),
    "a cube for the square": (spelt(square=lambda x: op.power(x, const(3))), WEIGHTS),
    "a square that is almost one": (spelt(square=lambda x: op.power(x, const(2.001))), WEIGHTS),
    "a square of something else": (spelt(of=lambda emit, x, _: x), WEIGHTS),
    "divided by the wrong way round": (
        spelt(divide=lambda emit, deviation, root: emit(op.divide(root, deviation))),
        WEIGHTS,
    ),
    "twice the inverse": (
        spelt(divide=lambda emit, d, root: emit(op.multiply(emit(op.divide(const(2), root)), d))),
        WEIGHTS,
    ),
    "one gain for all": (spelt(), {"gain": normal(1), "bias": normal(C)}),
    "a gain for each position": (spelt(), {"gain": normal(5, C), "bias": normal(C)}),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_other_quotients_stay(graph_of, calls, case):
    body, weights = LEFT_ALONE[case]
    before = graph_of(body, X, weights)
    assert calls(recover_layer_norm(before)) == calls(before)
