"""Runs OpenVINO's CPU plugin on the exported files, with a hint for the precision asked for."""

from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from bench.backends import Backend, Variant, in_float32
from bench.correctness.rounding import Rounding, by_32, by_row_with_offset, int4_by_group
from bench.models.artifacts import EXPORTED, OPENVINO, OPENVINO_PAST, PAST, Artifacts
from export.signature import SEEN
from gpt.cli import UserError

if TYPE_CHECKING:
    from openvino import CompiledModel, InferRequest, Model, Tensor

    from bench.models.inputs import Inputs

CAPABILITIES = "OPTIMIZATION_CAPABILITIES"  # the name of OpenVINO's list of what the plugin has kernels for

# The plugin rounds activations in groups of 32 on a CPU whose products of bytes are fast, and elsewhere not at all.
IN_8_BITS = Rounding(by_row_with_offset, by_32, tables=by_row_with_offset)
IN_4_BITS = Rounding(int4_by_group, by_32, head=by_row_with_offset, tables=by_row_with_offset)


def _files(forward: str, with_past: str) -> dict[str, str]:
    return {"prefill": forward, "decode": with_past, "generate": with_past}


def _compressed(bits: int, about: str, rounding: Rounding) -> Variant:
    files = _files(OPENVINO.format(bits), OPENVINO_PAST.format(bits))
    return Variant(files, f"int{bits}", {"nncf": "nncf"}, about, rounding=rounding)


class Engine(Backend[Artifacts]):
    """Compiles each prefill shape, a model for prompts of any shape, and one for a token after a past of any length.

    The plugin has no in-place cache: past keys and values are inputs, present ones outputs. Two infer requests
    alternate, so that one reads the outputs of the other without a copy. With a stateful model, OpenVINO's own cache,
    the same graph was 1.1 to 6 times slower.
    """

    requires: ClassVar[dict[str, str]] = {"openvino": "openvino"}
    summary = "OpenVINO, CPU plugin, on the exported files; past keys and values in, present ones out"
    variants: ClassVar[dict[str, Variant]] = {
        "": Variant(_files(EXPORTED, PAST), about="held to float32"),
        "bf16": Variant(_files(EXPORTED, PAST), "bf16", about="with the hint to compute in bfloat16"),
        "int8": _compressed(8, "weights in 8 bits by NNCF, activations as the plugin sees fit", IN_8_BITS),
        "int4": _compressed(4, "weights in 4 bits by NNCF, tables and head in 8", IN_4_BITS),
    }

    def _load(self, artifacts: Artifacts, threads: int) -> None:
        import openvino

        self._core = openvino.Core()
        if self.variant.precision == "bf16" and "BF16" not in self._core.get_property("CPU", CAPABILITIES):
            raise UserError("OpenVINO has no bfloat16 on this CPU: it would compute in float32")
        self._artifacts = artifacts
        self._settings = {
            "INFERENCE_NUM_THREADS": threads,
            # the default is bfloat16 on a CPU that has it
            "INFERENCE_PRECISION_HINT": "bf16" if self.variant.precision == "bf16" else "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
        }
        self._of_shape: tuple[tuple[int, int], CompiledModel] | None = None  # the last shape that was run
        self._steps: tuple[int, list[InferRequest]] = (0, [])  # the batch size, and the two requests that alternate

    def _prefill(self, ids: np.ndarray) -> np.ndarray:
        if self._of_shape is None or self._of_shape[0] != ids.shape:
            self._of_shape = None  # free it first: each compiled model copies the weights, ten of GPT-2 took 13 GB
            model = self._read("prefill")
            if not self._whole.signature.past:  # of no tokens, which is no shape to the plugin
                model.reshape({name: list(array.shape) for name, array in self._whole(ids).items()})
            self._of_shape = ids.shape, self._compile(model)
        given = self._whole(ids) | self._whole.empty(len(ids))
        results = self._of_shape[1](given, share_inputs=True, share_outputs=True)
        return in_float32(results[self._whole.signature.logits])

    def _fill(self, ids: np.ndarray) -> np.ndarray:
        from openvino import Tensor

        B = len(ids)
        empty = [Tensor(array) for array in self._stepwise.empty(B).values()]
        logits = self._run(self._prompt, ids, empty, 0)
        self._past, self._past_tokens = self._present_of(self._prompt), ids.shape[1]
        if self._steps[0] != B:
            step = self._compile(self._one_token(B))
            self._steps = B, [step.create_infer_request() for _ in range(2)]
        self._next: list[Tensor] | None = None
        return logits

    def _decode(self, ids: np.ndarray, context: int) -> np.ndarray:
        if context == self._past_tokens + 1 and self._next is not None:  # the outputs of the last call become the past
            self._past, self._next, self._past_tokens = self._next, None, context
            self._steps[1].reverse()
        elif context != self._past_tokens:
            self._past, self._next, self._past_tokens = self._shortened(context), None, context
        logits = self._run(self._steps[1][0], ids, self._past, context)
        self._next = self._present_of(self._steps[1][0])
        return logits

    def _run(self, request: "InferRequest", ids: np.ndarray, past: "list[Tensor]", tokens: int) -> np.ndarray:
        """Run a request after a past of so many tokens, and return a view of the last position's logits [B, V]."""
        from openvino import Tensor

        for name, array in self._stepwise(ids, tokens).items():
            request.set_tensor(name, Tensor(array))
        for name, tensor in zip(self._stepwise.signature.past, past, strict=True):
            request.set_tensor(name, tensor)
        request.infer()
        return in_float32(request.get_tensor(self._stepwise.signature.logits).data[:, -1])

    def _present_of(self, request: "InferRequest") -> "list[Tensor]":
        signature = self._stepwise.signature
        return [request.get_tensor(signature.presents[name]) for name in signature.past]

    def _shortened(self, context: int) -> "list[Tensor]":
        """Copy the first `context` rows of the longest keys and values at hand."""
        from openvino import Tensor

        signature = self._stepwise.signature
        return [
            Tensor(tensor.data[(slice(None),) * signature.length_axis(name) + (slice(context),)].copy())
            for name, tensor in zip(signature.past, self._next or self._past, strict=True)
        ]

    @cached_property
    def _whole(self) -> "Inputs":
        """What the file for prefill is given."""
        from bench.models.inputs import inputs_of

        return inputs_of(self._artifacts.path(EXPORTED))

    @cached_property
    def _stepwise(self) -> "Inputs":
        """What the file with a past is given."""
        from bench.models.inputs import inputs_of

        return inputs_of(self._artifacts.path(PAST))

    @cached_property
    def _prompt(self) -> "InferRequest":
        return self._compile(self._read("decode")).create_infer_request()

    def _one_token(self, B: int) -> "Model":
        """Read the model with static shapes for one token of B sequences; only the length of the past stays dynamic."""
        from openvino import Dimension

        model, signature, past = (
            self._read("decode"),
            self._stepwise.signature,
            Dimension(1, self.config.block_size - 1),
        )
        shapes = {}
        for name, array in self._stepwise(np.zeros((B, 1), np.int64), 1).items():
            is_mask = signature.roles.get(name) == SEEN  # which is as long as the past and the token
            shapes[name] = [B, Dimension(2, self.config.block_size)] if is_mask else list(array.shape)
        for name, array in self._stepwise.empty(B).items():
            axis = signature.length_axis(name)
            shapes[name] = [past if place == axis else size for place, size in enumerate(array.shape)]
        model.reshape(shapes)
        return model

    def _read(self, phase: str) -> "Model":
        from export.artifact import exported_from, read_onnx
        from export.quantize import read_openvino
        from export.storage import external_tensors

        path = self._artifacts.path(self.variant.files[phase])
        if path.is_dir():  # a compressed model
            graph, weights = read_openvino(path)
            return self._core.read_model(graph, weights)
        file = read_onnx(path)
        if self._artifacts.onnx is None:
            exported_from(file)  # checks that it is whole
        # Weights in a second file are found beside the graph, so both are opened again.
        return self._core.read_model(path if any(external_tensors(file.proto)) else file.content)

    def _compile(self, model: "Model") -> "CompiledModel":
        return self._core.compile_model(model, "CPU", self._settings)

    def versions(self) -> dict[str, str]:
        import openvino

        return {"openvino": openvino.__version__}
