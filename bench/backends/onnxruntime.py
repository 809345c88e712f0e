"""Runs ONNX Runtime's CPU execution provider on the exported files."""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from bench.backends import Backend, Variant
from bench.correctness.rounding import Rounding, by_matrix, by_tensor_with_offset
from bench.models.artifacts import CACHED, CACHED_INT8, EXPORTED, EXPORTED_INT8, Artifacts

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, IOBinding

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
        self._folder, self._threads = artifacts.folder, threads

    def _prefill(self, ids: np.ndarray) -> np.ndarray:
        return self._forward.run(["logits"], {"ids": ids})[0]

    def _fill(self, ids: np.ndarray) -> np.ndarray:
        B, config = len(ids), self.config
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

    @cached_property
    def _forward(self) -> "InferenceSession":
        return self._open(self._folder / self.variant.files["prefill"])

    @cached_property
    def _with_cache(self) -> "InferenceSession":
        return self._open(self._folder / self.variant.files["decode"])

    def _open(self, path: Path) -> "InferenceSession":
        import onnxruntime

        from export.artifact import exported_from, read_onnx

        file = read_onnx(path)
        # Weights in a second file are found beside the graph, so both are opened again.
        model = str(path) if exported_from(file).weights else file.content
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
