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
from tvm.script.parser.core.parser import Parser, ScriptMacro

from gpt.cli import UserError

FORCE_SOURCE = "TVM_COMPILE_FORCE_FALLBACK"  # TVM's variable: to give CUDA source where a driver would take code too


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
