"""Every change that this project makes to TVM itself: what it changes, why, and which test shows that TVM needs it.

The tests are in tests/upstream/test_tvm.py. Each fails on the day that TVM needs the change no more, so that the change
can go. Two changes are elsewhere, since they are made in other processes: `relay/worker.py` makes them to TVM 0.17 in
Relay's environment, which this project's files are not imported into.
"""

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import FrameType
from typing import Any

import tvm
import tvm_ffi
from tvm import te, topi
from tvm.relax.transform.legalize_ops import nn as tvms_own
from tvm.script.parser.core.parser import Parser, ScriptMacro

from gpt.cli import UserError

FORCE_SOURCE = "TVM_COMPILE_FORCE_FALLBACK"  # TVM's variable: to give CUDA source where a driver would take code too
TVMS_ATTENTION = tvms_own._te_attention


@wraps(ScriptMacro._find_parser_def)
def _find_parser(macro: ScriptMacro) -> Parser:
    """Find the parser that expands a macro, by the frames of its callers alone. Raises RuntimeError outside of one."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if (parser := frame.f_globals.get(macro.parser_object_name)) is not None:
            return parser
        frame = frame.f_back
    raise RuntimeError(f"{macro.parser_object_name} not available")  # as TVM's own says


def patch_macro_lookup() -> None:
    """Replace the search for the parser that expands a macro, for the rest of the process.

    TVM's own reads the source of every frame from the macro up to the program's first, at each macro: most of the time
    that it takes to parse a kernel. Test: test_a_macro_is_expanded_without_reading_the_source_of_its_callers.
    """
    ScriptMacro._find_parser_def = _find_parser


def stack_without_source(context: int = 0) -> list[inspect.FrameInfo]:
    """List the frames of the callers as `inspect.stack` does, but without the lines of source around each."""
    walk = ((frame, line) for frame, line in traceback.walk_stack(sys._getframe(1)))
    return [inspect.FrameInfo(frame, frame.f_code.co_filename, line, "", None, None) for frame, line in walk]


def import_tensor_intrinsics() -> None:
    """Import TVM's tensor intrinsics, as MetaSchedule does, in seconds instead of a minute.

    Each of them asks `inspect.stack` for the frames that it is defined in, and gets the lines of source of all of them
    too. Within this import the stack has no source.
    Test: test_a_kernel_is_defined_without_reading_the_source_of_its_callers.
    """
    stack, inspect.stack = inspect.stack, stack_without_source
    try:
        importlib.import_module("tvm.s_tir.tensor_intrin")
    finally:
        inspect.stack = stack


def register_errors() -> None:
    """Let KeyboardInterrupt and UserError keep their type on the way through TVM, for the rest of the process.

    An exception of a type that TVM does not know, raised by Python that C++ calls, as a rewrite in a pass, reaches the
    caller as a RuntimeError. Test: test_an_exception_keeps_its_type_on_its_way_through_tvm.
    """
    for exception in (KeyboardInterrupt, UserError):
        tvm_ffi.register_error(exception.__name__, exception)


@contextmanager
def replaced_cuda_build(
    build: Callable[[tvm.IRModule, tvm.target.Target, Callable[..., Any]], Any],
) -> Iterator[None]:
    """Have TVM call `build` for the CUDA kernels of a module within the block.

    build: takes the module, the target and TVM's own build, which gives CUDA source within the block, also where a
    driver is; returns the runtime module. Without a driver TVM exports the source of kernels, which looks compiled and
    is not. Test: test_cuda_is_compiled_to_machine_code_where_no_driver_is.
    """
    build_source = tvm_ffi.get_global_func("target.build.cuda")
    forced = os.environ.get(FORCE_SOURCE)
    os.environ[FORCE_SOURCE] = "1"
    tvm_ffi.register_global_func(
        "target.build.cuda", lambda module, target: build(module, target, build_source), override=True
    )
    try:
        yield
    finally:
        tvm_ffi.register_global_func("target.build.cuda", build_source, override=True)
        if forced is None:
            del os.environ[FORCE_SOURCE]
        else:
            os.environ[FORCE_SOURCE] = forced


def _causal_attention(
    q: te.Tensor,
    k: te.Tensor,
    v: te.Tensor,
    bias: te.Tensor | None,
    scale: tvm.tirx.FloatImm | None,
    causal_mask: str | None,
) -> te.Tensor:
    """Compute attention as TVM's `_te_attention` does, in the same order, but for the score of a hidden key.

    q [B, T, nh, hs], k and v [B, S, nh, hs], bias [B, nh, T, S] → [B, T, nh, hs].
    """
    if causal_mask is None:
        return TVMS_ATTENTION(q, k, v, bias, scale, None)
    B, T, nh, hs = q.shape
    _, S, _, hs_v = v.shape
    q, k, v = (topi.transpose(each, [0, 2, 1, 3]) for each in (q, k, v))
    q, k, v = topi.reshape(q, [B * nh, T, hs]), topi.reshape(k, [B * nh, S, hs]), topi.reshape(v, [B * nh, S, hs_v])
    scores = topi.nn.batch_matmul(q, k, oshape=[B * nh, T, S])
    if scale is None:
        scores = topi.divide(scores, tvm.tirx.sqrt(tvm.tirx.Cast(scores.dtype, hs)))
    else:
        scores = topi.multiply(scores, scale)
    if bias is not None:
        scores = topi.reshape(topi.add(topi.reshape(scores, [B, nh, T, S]), bias), [B * nh, T, S])
    offset = {"TopLeft": 0, "BottomRight": tvm.tirx.abs(T - S)}[causal_mask]

    def masked(data: te.Tensor, hidden: Any) -> te.Tensor:
        return te.compute(
            data.shape,
            lambda b, t, s: tvm.tirx.Select(s <= t + offset, data[b, t, s], hidden),
            name="masked",
            tag=topi.tag.ELEMWISE,
        )

    scores = masked(scores, tvm.tirx.min_value(scores.dtype))  # TVM's own has 0 here
    weights = masked(topi.exp(scores - topi.max(scores, axis=-1, keepdims=True)), tvm.tirx.const(0, scores.dtype))
    weights = topi.divide(weights, topi.sum(weights, axis=-1, keepdims=True))
    y = _weighted(weights, v) if causal_mask == "BottomRight" else _weighted_by_tvm(weights, v)
    return topi.transpose(topi.reshape(y, [B, nh, T, hs_v]), [0, 2, 1, 3])


def _weighted_by_tvm(weights: te.Tensor, v: te.Tensor) -> te.Tensor:
    """Sum v [N, S, hs] by weights [N, T, S], S being a number or one symbol: [N, T, hs]."""
    return topi.nn.batch_matmul(weights, v, transpose_b=False, oshape=[*weights.shape[:2], v.shape[2]])


def _weighted(weights: te.Tensor, v: te.Tensor) -> te.Tensor:
    """Do the same for an S that is a sum of symbols, as P + T, two of which TVM's product does not see to be equal."""
    s = te.reduce_axis((0, weights.shape[2]), "s")
    return te.compute(
        [*weights.shape[:2], v.shape[2]],
        lambda n, t, d: te.sum(weights[n, t, s] * v[n, s, d], axis=s),
        name="weighted",
    )


def patch_attention() -> None:
    """Replace what TVM lowers causal attention to, for the rest of the process and at every opt level.

    TVM's own takes the largest score of a row with a 0 for each hidden key: where all the others lie below about -100,
    every exponential is 0, and the row is 0 / 0. Test: test_causal_attention_of_scores_far_below_0_is_no_nan.
    """
    tvms_own._te_attention = _causal_attention
