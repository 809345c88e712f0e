"""A compiled model in memory: the whole sequence at once, or step by step with a KV cache."""

import os
from typing import Any

import numpy as np
import tvm
from tvm import relax

from gpt.cli import UserError
from gpt.tokenizer import check_ids
from tvm_frontend.artifact import LIBRARY, WEIGHTS, CompiledModel
from tvm_frontend.cuda_toolchain import load_cuda_runtime
from tvm_frontend.graph import ENTRY
from tvm_frontend.target import CompileTarget


class _Loaded:
    """The library and its weights on the device."""

    def __init__(self, model: CompiledModel, threads: int) -> None:
        os.environ["TVM_NUM_THREADS"] = str(threads)  # before TVM's thread pool starts
        self.model = model
        self._on_cpu = CompileTarget.from_json(model.target).kind == "llvm"
        if not self._on_cpu:
            load_cuda_runtime()
        self._inputs: dict[str, tuple[tvm.runtime.Tensor, np.ndarray]] = {}  # each with its memory as numpy sees it
        self._device = tvm.cpu() if self._on_cpu else tvm.cuda()
        weights = tvm.runtime.load_param_dict_from_file(str(model.path / WEIGHTS))
        # Named by their place, as the order of the arguments is what matters.
        self._weights = [weights[str(i)].copyto(self._device) for i in range(len(weights))]
        library = tvm.runtime.load_module(str(model.path / LIBRARY))
        self._forward = relax.VirtualMachine(library, self._device)[ENTRY]

    def _on_device(self, name: str, array: np.ndarray) -> tvm.runtime.Tensor:
        """An input as a tensor, on the CPU the one of the call before if its shape is the same: a new one takes as long
        as several kernels of a small model."""
        if not self._on_cpu:
            return tvm.runtime.tensor(np.ascontiguousarray(array, np.int64), self._device)
        tensor, view = self._inputs.get(name, (None, None))
        if view is None or view.shape != array.shape:
            tensor = tvm.runtime.empty(array.shape, "int64", self._device)
            view = np.from_dlpack(tensor)
            self._inputs[name] = tensor, view
        view[...] = array
        return tensor

    def _to_numpy(self, logits: tvm.runtime.Tensor) -> np.ndarray:
        # On the CPU a view: logits of 128 positions and GPT-2's vocabulary are 26 MB, and a copy takes 5 ms.
        return np.from_dlpack(logits) if self._on_cpu else logits.numpy()

    def _check(self, ids: Any, filled: int = 0) -> np.ndarray:
        """The ids as an array. Raises UserError unless they are [B, T], in the vocabulary, and fit behind `filled`."""
        ids = np.asarray(ids)
        config = self.model.config
        room = config.block_size - filled
        if ids.ndim != 2 or not 1 <= ids.shape[1] <= room:
            after = f" after {filled} in the cache" if filled else ""
            raise UserError(f"ids of shape {list(ids.shape)}{after}: must be [B, T] with T from 1 to {room}")
        check_ids(ids, config)
        return ids


class Session(_Loaded):
    """A compiled forward pass."""

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """The logits at every position: ids int64 [B, T], any B, T up to block_size → float32 [B, T, V].

        Raises UserError if T is too large or an id is not in the vocabulary.
        """
        return self._to_numpy(self._forward(self._on_device("ids", self._check(ids)), self._weights))


class CachedSession(_Loaded):
    """A compiled step over a KV cache, which lives here: keys and values of each layer [B, nh, block_size, hs]."""

    def __init__(self, model: CompiledModel, threads: int) -> None:
        super().__init__(model, threads)
        self._cache: list[tvm.runtime.Tensor] = []

    def begin(self, B: int) -> None:
        """Make an empty cache for B sequences. Raises UserError for fewer than one."""
        if B < 1:
            raise UserError(f"B={B}: must be at least 1")
        config = self.model.config
        shape = (B, config.n_head, config.block_size, config.head_size)
        # Zeros: untuned code multiplies what lies beyond a sequence by weights of 0, and 0 · NaN is NaN.
        empty = np.zeros(shape, self.model.dtype)
        self._cache = [tvm.runtime.tensor(empty, self._device) for _ in range(2 * config.n_layer)]

    def step(self, ids: np.ndarray, pos: np.ndarray) -> np.ndarray:
        """Logits float32 [B, T, V] of ids int64 [B, T], which come after pos int64 [B] tokens of each sequence.

        The cache then holds pos + T rows of each. Prompts of different length are padded at the end; pos of the next
        step says where each really ended. Raises UserError for shapes that do not fit the cache, positions beyond
        block_size and ids that are not in the vocabulary.
        """
        if not self._cache:
            raise UserError("no cache yet: begin(B) makes one for B sequences")
        pos, B = np.asarray(pos), self._cache[0].shape[0]
        if pos.shape != (B,) or np.shape(ids)[:1] != (B,):
            raise UserError(
                f"ids of shape {list(np.shape(ids))} with pos of shape {list(pos.shape)}: the cache is of B={B} "
                "sequences, and begin(B) makes another"
            )
        if not np.issubdtype(pos.dtype, np.integer) or pos.min() < 0:
            raise UserError(f"pos={pos.tolist()}: must be whole numbers of at least 0")
        ids = self._check(ids, int(pos.max()))
        inputs = self._on_device("ids", ids), self._on_device("pos", pos)
        results = self._forward(*inputs, *self._cache, self._weights)  # logits, pos + T, the cache
        if not results[2].same_as(self._cache[0]):  # untuned code makes another one
            self._cache = list(results[2:])
        return self._to_numpy(results[0])

    def fill(self, ids: np.ndarray) -> np.ndarray:
        """Begin anew with a prompt, ids int64 [B, T]: logits float32 [B, V] of its last position. Raises UserError."""
        ids = self._check(ids)
        if not self._cache or self._cache[0].shape[0] != len(ids):
            self.begin(len(ids))
        return self.step(ids, np.zeros(len(ids), np.int64))[:, -1]

    def decode(self, ids: np.ndarray, context: int) -> np.ndarray:
        """Logits float32 [B, V] of one token each, ids int64 [B, 1], after the first `context` in the cache.

        Raises UserError.
        """
        return self.step(ids, np.full(len(ids), context, np.int64))[:, -1]
