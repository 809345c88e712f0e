"""Runs nodes by the importer and by ONNX Runtime, which alone knows what operators of com.microsoft compute."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tvm
from onnx import helper, numpy_helper
from tvm import relax

from gpt.cli import UserError
from tvm_frontend.frontends.onnx.importer import import_onnx
from tvm_frontend.options import CompileOptions
from tvm_frontend.pipeline import compile_graph
from tvm_frontend.target import resolve_target

TARGET = resolve_target()
Feeds = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """One node: its inputs in order, "" for one that is not there, each an input of the file or a constant in it.

    dims: names of the dimensions of some inputs, where these are symbols. outputs: 0 for one that is not named.
    compared: cuts an output, by its number, to what is defined.
    """

    op: str
    order: list[str]
    inputs: Feeds = field(default_factory=dict)
    constants: Feeds = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    outputs: tuple[int, ...] = (1,)
    dims: dict[str, list] = field(default_factory=dict)
    compared: dict[int, Callable[[np.ndarray], np.ndarray]] = field(default_factory=dict)
    before: tuple[tuple[str, list[str], str, dict[str, Any]], ...] = ()  # other nodes: operator, inputs, output, how

    @property
    def results(self) -> list[int]:
        return [number for number, wanted in enumerate(self.outputs) if wanted]


def file_of(cases: list[Case], opset: int = 21) -> tuple[onnx.ModelProto, Feeds]:
    """One file with the nodes of all cases, and what to feed it."""
    nodes, inputs, weights, outputs, feeds = [], [], [], [], {}
    for number, case in enumerate(cases):

        def named(name: str, number: int = number) -> str:
            return name and f"{name}{number}"

        for name, array in case.inputs.items():
            feeds[named(name)] = np.asarray(array)
            dims = [f"{dim}{number}" if isinstance(dim, str) else dim for dim in case.dims.get(name, array.shape)]
            inputs.append(
                helper.make_tensor_value_info(named(name), helper.np_dtype_to_tensor_dtype(array.dtype), dims)
            )
        weights += [numpy_helper.from_array(np.asarray(array), named(n)) for n, array in case.constants.items()]
        for op, used, made, how in case.before:
            nodes.append(helper.make_node(op, [named(n) for n in used], [named(made)], f"{made}{number}", **how))
        produced = [f"y{number}_{index}" if wanted else "" for index, wanted in enumerate(case.outputs)]
        domain, _, op = case.op.rpartition(".")
        order = [named(name) for name in case.order]
        nodes.append(helper.make_node(op, order, produced, f"node{number}", domain=domain, **case.attributes))
        outputs += [helper.make_empty_tensor_value_info(name) for name in produced if name]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, weights)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10), feeds


def by_onnxruntime(proto: onnx.ModelProto | str, feeds: Feeds, *, optimized: bool = False) -> list[np.ndarray]:
    """The file's outputs by ONNX Runtime, its integer products exact: without AVX-512 they saturate otherwise."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1")
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = proto if isinstance(proto, str) else proto.SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def compiled(
    proto: onnx.ModelProto, opt_level: int = 0, precision: str = "fp32"
) -> Callable[[Feeds], list[np.ndarray]]:
    """The file compiled at an opt level: from what it is fed to its outputs."""
    made = compile_graph(lambda: import_onnx(proto), TARGET, CompileOptions(opt_level=opt_level, precision=precision))
    machine = relax.VirtualMachine(made.executable, tvm.cpu())
    weights = [tvm.runtime.tensor(array) for array in made.graph.weights.values()]

    def run(feeds: Feeds) -> list[np.ndarray]:
        arguments = [tvm.runtime.tensor(feeds[value.name]) for value in proto.graph.input]
        found = machine["forward"](*arguments, weights)
        return [each.numpy() for each in ([found] if hasattr(found, "numpy") else found)]

    run.kernels = made.graph.kernels
    return run


def compare(cases: list[Case], *, opt_level: int = 0, rtol: float = 1e-5, atol: float = 2e-6, **how: Any) -> None:
    """Compare the importer's outputs of some nodes with ONNX Runtime's."""
    proto, feeds = file_of(cases, **how)
    expected = by_onnxruntime(proto, feeds)
    owners = [(case, number) for case in cases for number in case.results]
    found = compiled(proto, opt_level)(feeds)
    for left, right, (case, number) in zip(found, expected, owners, strict=True):
        message = f"output {number} of {case.op} {case.attributes} { ({n: a.shape for n, a in case.inputs.items()}) }"
        assert (left.shape, left.dtype) == (right.shape, right.dtype), message
        cut = case.compared.get(number, lambda array: array)
        np.testing.assert_allclose(cut(left), cut(right), rtol=rtol, atol=atol, err_msg=message)


def compare_at(make: Callable[..., Case], shapes: list[tuple], opt_level: int = 0) -> dict[str, int]:
    """Compile the node of the first shape, whose `dims` are symbols, and compare it at each; give its kernels.

    make: from a shape to a case, all of the same constants.
    """
    proto, _ = file_of([make(*shapes[0])])
    run = compiled(proto, opt_level)
    for shape in shapes:
        case = make(*shape)
        feeds = file_of([case])[1]
        for number, left, right in zip(case.results, run(feeds), by_onnxruntime(proto, feeds), strict=True):
            assert (left.shape, left.dtype) == (right.shape, right.dtype), shape
            cut = case.compared.get(number, lambda array: array)
            np.testing.assert_allclose(cut(left), cut(right), rtol=1e-5, atol=2e-6, err_msg=str(shape))
    return run.kernels


def refusal(case: Case, **how: Any) -> str:
    """The words with which the importer refuses a node."""
    with pytest.raises(UserError) as caught:
        import_onnx(file_of([case], **how)[0])
    said = str(caught.value)
    assert "\n" not in said
    return said
