import inspect

import pytest
from tvm.script import tirx as T

from tvm_frontend.kernels.cpu.attention import causal_attention
from tvm_frontend.kernels.cpu.formats import FP32
from tvm_frontend.kernels.cpu.register_tile import Tile


def test_the_source_of_the_callers_is_not_read_for_each_macro(monkeypatch):
    read = []
    getouterframes = inspect.getouterframes
    monkeypatch.setattr(inspect, "getouterframes", lambda *given: read.append(given) or getouterframes(*given))
    causal_attention(2, 8, Tile(6, 2, 8), 0.35, FP32)
    assert len(read) <= 2  # TVM's for the kernel itself


def test_a_macro_outside_of_a_kernel_is_refused_as_tvm_refuses_it():
    @T.macro
    def double(out):
        out[0] = out[0] * T.float32(2)

    with pytest.raises(RuntimeError, match="not available"):
        double(T.buffer((1,), "float32"))
