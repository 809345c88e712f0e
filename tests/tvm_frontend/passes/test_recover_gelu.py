import math

import ml_dtypes
import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from tvm_frontend.passes.recover_gelu import recover_gelu

T = tvm.tirx.Var("T", "int64")
SLOPE = math.sqrt(2 / math.pi)
NARROW = math.sqrt(0.5)
X = {"x": ((T, 20), "float32")}


def const(number):
    return relax.const(np.float32(number))


def tanh_of(emit, x, cubic, scale=SLOPE, factor=0.044715):
    scaled = emit(op.multiply(cubic, const(factor)))
    return emit(op.tanh(emit(op.multiply(const(scale), emit(op.add(x, scaled))))))


def with_power(emit, x):
    """As torch.onnx's dynamo exporter writes it up to opset 19."""
    curve = tanh_of(emit, x, emit(op.power(x, const(3))))
    return op.multiply(x, emit(op.multiply(const(0.5), emit(op.add(curve, const(1))))))


def with_products(emit, x):
    """As its former exporter does."""
    curve = tanh_of(emit, x, emit(op.multiply(x, emit(op.multiply(x, x)))))
    return op.multiply(const(0.5), emit(op.multiply(x, emit(op.add(const(1), curve)))))


def half_first(emit, x):
    """As transformers' GPT-2 has it."""
    curve = tanh_of(emit, x, emit(op.power(x, const(3))))
    return op.multiply(emit(op.multiply(x, const(0.5))), emit(op.add(curve, const(1))))


def with_constants(scale, factor):
    def body(emit, x):
        curve = tanh_of(emit, x, emit(op.power(x, const(3))), scale=scale, factor=factor)
        return op.multiply(x, emit(op.multiply(const(0.5), emit(op.add(curve, const(1))))))

    return body


def by_division(emit, x):
    curve = emit(op.erf(emit(op.divide(x, const(math.sqrt(2))))))
    return op.multiply(emit(op.multiply(x, emit(op.add(curve, const(1))))), const(0.5))


def by_product(emit, x):
    curve = emit(op.erf(emit(op.multiply(x, const(NARROW)))))
    return op.multiply(x, emit(op.multiply(const(0.5), emit(op.add(const(1), curve)))))


FORMS = {with_power: "gelu_tanh", with_products: "gelu_tanh", half_first: "gelu_tanh", by_division: "gelu"}
FORMS |= {by_product: "gelu"}


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_a_gelu_that_is_spelt_out_is_one_operator(graph_of, calls, rewritten, form):
    before = graph_of(form, X, {})
    after = recover_gelu(before)
    assert calls(after) == {f"relax.nn.{FORMS[form]}": 1}
    rewritten(before, after, [np.linspace(-6, 6, 100, dtype="float32").reshape(5, 20)])


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_constants_rounded_to_16_bits_stand_for_the_exact_ones(graph_of, calls, dtype):
    rounded = [float(np.array(number).astype(dtype)) for number in (SLOPE, 0.044715)]
    assert calls(recover_gelu(graph_of(with_constants(*rounded), X, {}))) == {"relax.nn.gelu_tanh": 1}


def test_its_input_may_be_a_product(graph_of, calls, rewritten):
    before = graph_of(lambda emit, x: with_products(emit, emit(op.multiply(x, x))), X, {})
    after = recover_gelu(before)
    assert calls(after) == {"relax.multiply": 1, "relax.nn.gelu_tanh": 1}
    rewritten(before, after, [np.linspace(-2, 2, 20, dtype="float32").reshape(1, 20)])


def gated(scale=0.5, one=1.0, inner=NARROW, other=False):
    def body(emit, x):
        curve = emit(op.erf(emit(op.multiply(x, const(inner)))))
        gate = emit(op.add(curve, const(one)))
        return op.multiply(emit(op.multiply(emit(op.exp(x)) if other else x, const(scale))), gate)

    return body


LEFT_ALONE = {
    "the whole, not the half": gated(scale=1.0),
    "another constant": gated(one=2.0),
    "another width": gated(inner=1.0),
    "a width cut after three digits": gated(inner=0.707),
    "almost the half": gated(scale=0.501),
    "almost one": gated(one=1.001),
    "a slope cut after one digit": with_constants(0.8, 0.044715),
    "a slope cut after four digits": with_constants(0.7979, 0.044715),
    "a factor cut after three digits": with_constants(SLOPE, 0.0447),
    "a slope close to its rounding": with_constants(0.797, 0.044715),
    "a gate of something else": gated(other=True),
    "a square for the cube": lambda emit, x: op.multiply(
        emit(op.multiply(x, const(0.5))),
        emit(op.add(const(1), tanh_of(emit, x, emit(op.multiply(x, x))))),
    ),
    "x twice": lambda emit, x: op.multiply(x, emit(gated()(emit, x))),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_other_products_stay(graph_of, calls, case):
    before = graph_of(LEFT_ALONE[case], X, {})
    found = calls(recover_gelu(before))
    if case == "x twice":  # what is inside of it is one
        assert found == {"relax.nn.gelu": 1, "relax.multiply": 1}
    else:
        assert found == calls(before)
