"""Runs ONNX Runtime's CPU execution provider on the exported files."""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from bench.backends import Backend, Variant, in_float32
from bench.correctness.rounding import Rounding, by_matrix, by_tensor_with_offset
from bench.models.artifacts import CACHED, CACHED_INT8, EXPORTED, EXPORTED_INT8, Artifacts

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, IOBinding, OrtValue

    from bench.models.inputs import Inputs

PROVIDER = "CPUExecutionProvider"


def _files(forward: str, with_cache: str) -> dict[str, str]:
    return {"prefill": forward, "decode": with_cache, "generate": with_cache}


class Engine(Backend[Artifacts]):
    """Opens one session per file, with all graph optimisations and spinning threads, which are its defaults."""

    requires: ClassVar[dict[str, str]] = {"onnxruntime": "onnxruntime-gpu"}
    summary = "ONNX Runtime, CPU provider, on the exported files; the KV cache bound as input and output, so in place"
    variants: ClassVar[dict[str, Variant]] = {
        "": Variant(_files(EXPORTED, CACHED)),
        "bf16": Variant(
            _files(EXPORTED, CACHED), "bf16", unable="the CPU provider has no product of matrices in bfloat16"
        ),
        "int8": Variant(
            _files(EXPORTED_INT8, CACHED_INT8),
            "int8",
            about="as its own dynamic quantisation makes them: weights and activations of products in 8 bits",
            rounding=Rounding(by_matrix, by_tensor_with_offset),
        ),
    }

    def _load(self, artifacts: Artifacts, threads: int) -> None:
        self._artifacts, self._threads = artifacts, threads

    def _prefill(self, ids: np.ndarray) -> np.ndarray:
        if self._artifacts.onnx is None:
            return self._forward.run(["logits"], {"ids": ids})[0]
        given = self._inputs(ids) | self._inputs.empty(len(ids))
        return in_float32(self._forward.run([self._inputs.signature.logits], given)[0])

    def _fill(self, ids: np.ndarray) -> np.ndarray:
        if self._artifacts.onnx is not None:
            return self._fill_past(ids)
        B, config = len(ids), self.gpt
        shape = (B, config.n_head, config.block_size, config.head_size)
        self._cache = {
            f".{layer}.{part}": np.zeros(shape, np.float32)
            for layer in range(config.n_layer)
            for part in ("key", "value")
        }
        self._ids, self._pos = np.zeros((B, 1), np.int64), np.zeros(B, np.int64)
        self._logits = np.empty((B, 1, config.vocab_size), np.float32)
        self._step = self._bind(self._ids, self._logits)
        logits = np.empty((*ids.shape, config.vocab_size), np.float32)
        self._with_cache.run_with_iobinding(self._bind(np.ascontiguousarray(ids), logits))
        return logits[:, -1]

    def _decode(self, ids: np.ndarray, context: int) -> np.ndarray:
        if self._artifacts.onnx is not None:
            return self._decode_past(ids, context)
        self._ids[:], self._pos[:] = ids, context
        self._with_cache.run_with_iobinding(self._step)
        return self._logits[:, 0]

    def _bind(self, ids: np.ndarray, logits: np.ndarray) -> "IOBinding":
        """Bind numpy arrays to the cached model; a cache tensor is both input and output, so it is updated in place."""
        from onnxruntime import OrtValue

        binding = self._with_cache.io_binding()
        inputs = {"ids": ids, "pos": self._pos} | {f"cache{name}": array for name, array in self._cache.items()}
        outputs = {"logits": logits, "pos_out": np.empty_like(self._pos)}
        outputs |= {f"cache_out{name}": array for name, array in self._cache.items()}
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(array))
        for name, array in outputs.items():
            binding.bind_ortvalue_output(name, OrtValue.ortvalue_from_numpy(array))
        return binding

    def _fill_past(self, ids: np.ndarray) -> np.ndarray:
        """Do `_fill` with a file that is given the past and gives it back longer."""
        from onnxruntime import OrtValue

        empty = [OrtValue.ortvalue_from_numpy(array) for array in self._inputs.empty(len(ids)).values()]
        self._past: list[OrtValue] = []
        logits, self._longer = self._step_past(ids, empty, 0)
        self._tokens = ids.shape[1] - 1  # in the past, one fewer than in the longer one
        return logits

    def _decode_past(self, ids: np.ndarray, context: int) -> np.ndarray:
        """Do `_decode` so. The past before the last call is kept, for a call that does the same again."""
        if context == self._tokens + 1:
            self._past = self._longer
        elif context != self._tokens or not self._past:
            self._past = self._shortened(context)
        self._tokens = context
        logits, self._longer = self._step_past(ids, self._past, context)
        return logits

    def _step_past(self, ids: np.ndarray, past: "list[OrtValue]", tokens: int) -> "tuple[np.ndarray, list[OrtValue]]":
        """Return the last position's logits [B, V], and the past with the keys and values of ids, none of it copied."""
        from onnxruntime import OrtValue

        signature, binding = self._inputs.signature, self._forward.io_binding()
        given = self._inputs(ids, tokens)  # stays until the call is over, as its memory is only borrowed
        for name, array in given.items():
            binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(array))
        for name, value in zip(signature.past, past, strict=True):
            binding.bind_ortvalue_input(name, value)
        for output in [signature.logits, *(signature.presents[name] for name in signature.past)]:
            binding.bind_output(output)
        self._forward.run_with_iobinding(binding)
        logits, *longer = binding.get_outputs()
        return in_float32(logits.numpy()[:, -1]), longer

    def _shortened(self, context: int) -> "list[OrtValue]":
        """Copy the first `context` tokens of the longest keys and values at hand."""
        from onnxruntime import OrtValue

        signature = self._inputs.signature
        arrays = [value.numpy() for value in self._longer]
        return [
            OrtValue.ortvalue_from_numpy(
                np.ascontiguousarray(array[(slice(None),) * signature.length_axis(name) + (slice(context),)])
            )
            for name, array in zip(signature.past, arrays, strict=True)
        ]

    @cached_property
    def _inputs(self) -> "Inputs":
        from bench.models.inputs import inputs_of

        return inputs_of(self._artifacts.exported)

    @cached_property
    def _forward(self) -> "InferenceSession":
        return self._open(self._artifacts.path(self.variant.files["prefill"]))

    @cached_property
    def _with_cache(self) -> "InferenceSession":
        return self._open(self._artifacts.path(self.variant.files["decode"]))

    def _open(self, path: Path) -> "InferenceSession":
        import onnxruntime

        from export.artifact import exported_from, read_onnx
        from export.storage import external_tensors

        file = read_onnx(path)
        if self._artifacts.onnx is None:
            exported_from(file)  # checks that it is whole
        # Weights in a second file are found beside the graph, so both are opened again.
        model = str(path) if any(external_tensors(file.proto)) else file.content
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(model, options, providers=[PROVIDER])
        if session.get_providers() != [PROVIDER]:  # it silently falls back to others
            raise RuntimeError(f"asked for {PROVIDER}, got {session.get_providers()}")
        return session

    def versions(self) -> dict[str, str]:
        import onnxruntime

        return {"onnxruntime": onnxruntime.__version__}
