import numpy as np
import pytest
import tvm
from tvm.relax import op

from tvm_frontend.passes.fuse_attention import fuse_attention

B, T = tvm.tirx.Var("B", "int64"), tvm.tirx.Var("T", "int64")
nh, hs = 2, 12
C = nh * hs
QKV = {"qkv": ((B, T, 3 * C), "float32")}


def qkv_of(B, T, width=3 * C):
    return np.random.default_rng([B, T]).normal(size=(B, T, width)).astype("float32")


def attention(order=(0, 1, 2), heads=(B, T, nh, hs), merged=(B, T, C), axis=2, **how):
    """qkv to heads to attention and back, as the importer leaves it."""
    how = {"causal_mask": "TopLeft"} | how

    def body(emit, qkv):
        thirds = emit(op.split(qkv, 3, axis))
        q, k, v = (emit(op.reshape(emit(thirds[i]), heads)) for i in order)
        return op.reshape(emit(op.nn.attention(q, k, v, **how)), merged)

    return body


@pytest.mark.parametrize("scale", [None, 0.8])
def test_it_becomes_one_kernel_of_the_same_meaning(graph_of, calls, kernels, rewritten, scale):
    how = {} if scale is None else {"scale": tvm.tirx.const(scale, "float32")}
    before = graph_of(attention(**how), QKV, {})
    assert calls(before) == {"relax.split": 1, "relax.reshape": 4, "relax.nn.attention": 1}
    after = fuse_attention(before, kernels)
    assert calls(after) == {"causal_attention": 1}
    rewritten(before, after, [qkv_of(2, 5)])


LEFT_ALONE = {
    "no mask": attention(causal_mask=None),
    "a mask from the bottom right": attention(causal_mask="BottomRight"),
    "a window": attention(window_size=tvm.tirx.IntImm("int32", 4)),
    "the thirds in another order": attention(order=(1, 0, 2)),
    "positions and batch exchanged": attention(heads=(T, B, nh, hs), merged=(T, B, C)),
    "heads kept apart": attention(merged=(B, T, nh, hs)),
    "heads merged to another shape": attention(merged=(T, B, C)),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_attention_of_another_kind_stays(graph_of, calls, kernels, case):
    before = graph_of(LEFT_ALONE[case], QKV, {})
    assert calls(fuse_attention(before, kernels)) == calls(before)


def test_thirds_of_the_positions_are_no_qkv(graph_of, calls, kernels):
    how = {"heads": (B, 9, nh, hs), "merged": (B, 9, C), "axis": 1}
    before = graph_of(attention(**how), {"qkv": ((B, 9, 3 * C), "float32")}, {})
    assert calls(fuse_attention(before, kernels)) == calls(before)
