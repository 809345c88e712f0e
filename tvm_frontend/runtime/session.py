"""Runs a compiled model in memory: the whole sequence at once, or step by step with a KV cache.

Any thread may call a session, and one waits for the other. Threads that should run side by side take a `clone` each.
"""

import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import numpy as np
import tvm
import tvm_ffi
from tvm import relax

from gpt.cli import UserError
from tvm_frontend.artifact import CompiledModel, as_array
from tvm_frontend.cuda_toolchain import load_cuda_runtime
from tvm_frontend.graph import BODY, ENTRY, FORGET, HEAD
from tvm_frontend.runtime.exclusive import Exclusive, exclusive
from tvm_frontend.runtime.threads import use_threads
from tvm_frontend.target import CompileTarget

LAST = -1  # the row of the last position


class Loaded(Exclusive):
    """Loads a library, and its weights to the device."""

    def __init__(self, model: CompiledModel, threads: int, library: Path, part: str = "") -> None:
        use_threads(threads)  # so that too many are refused now, not in the middle of a step
        self.model = model
        self.threads = threads
        self._on_cpu = CompileTarget.from_json(model.target).kind == "llvm"
        if not self._on_cpu:
            load_cuda_runtime()
        self._device = tvm.cpu() if self._on_cpu else tvm.cuda()
        weights = [tvm.runtime.from_dlpack(array) for array in model.map_weights(part)]
        self._weights = tvm_ffi.convert(weights if self._on_cpu else [each.copyto(self._device) for each in weights])
        self._library = _load_library(library)
        self._make_own()

    def _make_own(self) -> None:
        """Make what a session shares with no other."""
        super().__init__()
        self._inputs: dict[str, tuple[tvm.runtime.Tensor, np.ndarray]] = {}  # with a numpy view of each
        self._uploaded: dict[tuple[str, tuple[int, ...]], tuple[tvm.runtime.Tensor, Any]] = {}  # with the number copied
        functions = relax.VirtualMachine(self._library, self._device)
        self._forward, self._forget = functions[ENTRY], functions[FORGET]
        self._parts = (functions[BODY], functions[HEAD]) if HEAD in self.model.entry_points else None

    @exclusive
    def clone(self) -> Self:
        """Open another session of the model, which can run at the same time in another thread.

        It shares the library and the weights, and takes little memory beside them; a KV cache it has none of yet. Each
        thread that calls a session runs its kernels on `threads` threads of its own.
        """
        other = copy.copy(self)
        other._make_own()
        return other

    def _run(self, ids: np.ndarray, *inputs: Any, rows: np.ndarray | int | None = None) -> tuple[np.ndarray, Any]:
        """Compute the logits [B, T, V], or with rows those at position rows[b] alone [B, 1, V], and all other results.

        ids: [B, T], checked. inputs: the function's further arguments, on the device.
        """
        use_threads(self.threads)
        self._forget()  # else the last logits would keep their memory while the next are computed
        inputs = self._on_device("ids", ids, ids.shape), *inputs, self._weights
        if rows is None or ids.shape[1] == 1 or self._parts is None:
            results = self._forward(*inputs)
            logits = self._to_numpy(first_of(results))
            if isinstance(rows, np.ndarray) and logits.shape[1] < ids.shape[1]:
                raise UserError("lengths: this model was exported for the last position alone")
            return (logits if rows is None else _rows_of(logits, rows)), results
        body, head = self._parts
        results = body(*inputs)
        B, T = ids.shape
        row = self._on_device("rows", T - 1 if isinstance(rows, int) else rows, (B,))
        return self._to_numpy(head(first_of(results), row, self._weights)), results

    def _on_device(self, name: str, value: np.ndarray | int, shape: tuple[int, ...]) -> tvm.runtime.Tensor:
        """Put an input in a tensor of that shape, filled with one number if it is one; int64 unless it is float64.

        Reuses the tensor that the same name and shape had before, where there is one.
        """
        dtype = "float64" if getattr(value, "dtype", None) == np.float64 else "int64"
        if not self._on_cpu:
            return self._upload(name, value, shape, dtype)
        tensor, view = self._inputs.get(name, (None, None))
        if view is None or view.shape != shape:  # allocating takes as long as several kernels of a small model
            tensor = tvm.runtime.empty(shape, dtype, self._device)
            view = np.from_dlpack(tensor)
            self._inputs[name] = tensor, view
        view[...] = value
        return tensor

    def _upload(self, name: str, value: np.ndarray | int, shape: tuple[int, ...], dtype: str) -> tvm.runtime.Tensor:
        tensor, there = self._uploaded.get((name, shape), (None, None))
        if tensor is None:
            tensor = tvm.runtime.empty(shape, dtype, self._device)
        if not (isinstance(value, int) and value == there):  # a copy waits for all pending work
            tensor.copyfrom(np.full(shape, value, dtype))
            self._uploaded[name, shape] = tensor, value if isinstance(value, int) else None
        return tensor

    def _to_numpy(self, logits: tvm.runtime.Tensor) -> np.ndarray:
        # On the CPU this is a view: logits of 128 positions and GPT-2's vocabulary are 26 MB, and a copy takes 5 ms.
        return np.from_dlpack(logits) if self._on_cpu else logits.numpy()


class Session(Loaded):
    """Runs a compiled forward pass."""

    @exclusive
    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """Compute the logits at every position: ids int64 [B, T], any B, T up to block_size → float32 [B, T, V].

        Raises UserError if T is too large or an id is not in the vocabulary.
        """
        return self._run(self.model.check_ids(ids))[0]

    @exclusive
    def last(self, ids: np.ndarray, lengths: np.ndarray | None = None) -> np.ndarray:
        """Compute the logits after each sequence's last token alone: ids int64 [B, T] → float32 [B, V], in less time.

        lengths: int64 [B], where each sequence ends, if not at T. Raises UserError as `prefill`, and for lengths that
        are not 1 to T.
        """
        ids = self.model.check_ids(ids)
        return self._run(ids, rows=last_rows(ids, lengths))[0][:, 0]


class CachedSession(Loaded):
    """Runs a compiled step over a KV cache, which it holds: keys and values of each layer [B, nh, block_size, hs].

    A model in fewer bits than fp32 keeps its cache so too: `kernels.cpu.kv_layout` says how.
    """

    def _make_own(self) -> None:
        super()._make_own()
        self._cache: list[tvm.runtime.Tensor] = []
        self._filled = np.zeros(0, np.int64)  # [B], the tokens of each sequence that the cache holds

    @exclusive
    def begin(self, B: int) -> None:
        """Make an empty cache for B sequences. Raises UserError for fewer than one."""
        if not is_whole(B) or B < 1:
            raise UserError(f"B={B}: must be a whole number of at least 1")
        # Zeros, as untuned code multiplies rows beyond a sequence by weights of 0, and 0 · NaN is NaN.
        empty = [np.zeros((B, *each["shape"]), each["dtype"]) for each in self.model.caches]
        self._cache = [tvm.runtime.tensor(array, self._device) for array in empty]
        self._filled = np.zeros(B, np.int64)

    @exclusive
    def step(self, ids: np.ndarray, pos: np.ndarray) -> np.ndarray:
        """Compute logits float32 [B, T, V] of ids int64 [B, T], which come after pos int64 [B] tokens of each sequence.

        The cache then holds pos + T rows of each. Prompts of different length are padded at the end; pos of the next
        step says where each really ended. Raises UserError for shapes that do not fit the cache, positions beyond
        what it holds or block_size, and ids that are not in the vocabulary.
        """
        pos = as_array("pos", pos)
        if pos.shape != (self._batch(),):
            raise UserError(f"pos of shape {list(pos.shape)}: {self._whose_cache()}")
        if pos.dtype.kind not in "iu" or pos.min() < 0:
            raise UserError(f"pos={pos.tolist()}: must be whole numbers of at least 0")
        return self._step(self.model.check_ids(ids, int(pos.max())), pos)

    @exclusive
    def fill(self, ids: np.ndarray, lengths: np.ndarray | None = None) -> np.ndarray:
        """Begin anew with a prompt, ids int64 [B, T], and return logits float32 [B, V] of its last position.

        lengths: int64 [B], where the prompt of each sequence ends, if not at T. Raises UserError.
        """
        ids = self.model.check_ids(ids)
        rows = last_rows(ids, lengths)
        if not self._cache or self._cache[0].shape[0] != len(ids):
            self.begin(len(ids))
        logits = self._step(ids, 0, rows)[:, 0]
        if isinstance(rows, np.ndarray):
            self._filled = rows + 1  # beyond them is padding
        return logits

    @exclusive
    def decode(self, ids: np.ndarray, context: int | np.ndarray) -> np.ndarray:
        """Compute logits float32 [B, V] of one token each, ids int64 [B, 1], after the first `context` in the cache.

        context: one number for all sequences, or int64 [B]. Raises UserError, also for more than the cache holds.
        """
        ids = as_array("ids", ids)
        if ids.ndim != 2 or ids.shape[1] != 1:
            raise UserError(f"ids of shape {list(ids.shape)}: must be [B, 1], one token a sequence; `step` takes more")
        if not is_whole(context):
            return self.step(ids, as_array("context", context))[:, -1]
        if context < 0:
            raise UserError(f"context={context}: must be at least 0")
        return self._step(self.model.check_ids(ids, int(context)), int(context), LAST)[:, 0]

    def _step(self, ids: np.ndarray, pos: np.ndarray | int, rows: np.ndarray | int | None = None) -> np.ndarray:
        """Do `step` with checked ids and positions, one number standing for all sequences; rows as in `_run`."""
        if len(ids) != self._batch():
            raise UserError(f"ids of shape {list(ids.shape)}: {self._whose_cache()}")
        if (pos > self._filled).any():
            raise UserError(
                f"{np.max(pos)} tokens before the new ones: the cache holds {self._filled.tolist()} of each sequence, "
                "and `fill` or `step` puts them there"
            )
        # The function returns logits, pos + T and the cache.
        logits, results = self._run(ids, self._on_device("pos", pos, (len(ids),)), *self._cache, rows=rows)
        if not results[2].same_as(self._cache[0]):  # untuned code returns another one
            self._cache = list(results[2:])
        self._filled = np.zeros_like(self._filled) + pos + ids.shape[1]
        return logits

    def _batch(self) -> int:
        """Give the number of sequences in the cache. Raises UserError if there is no cache yet."""
        if not self._cache:
            raise UserError("no cache yet: begin(B) makes one for B sequences")
        return self._cache[0].shape[0]

    def _whose_cache(self) -> str:
        return f"the cache is of B={self._batch()} sequences, and begin(B) makes another"


def _load_library(path: Path) -> tvm_ffi.Module:
    """Load the library at `path`, even if another was loaded from there before, which the linker would reuse.

    It is unloaded with the last session of it: by default each that was ever loaded would stay in memory.
    """
    with TemporaryDirectory() as folder:
        link = Path(folder, path.name)
        link.symlink_to(path.resolve())
        return tvm_ffi.load_module(link, keep_module_alive=False)  # tvm.runtime's loader would resolve the link


def is_whole(number: Any) -> bool:
    """Tell if an argument is one whole number; True and False are none."""
    return isinstance(number, int | np.integer) and not isinstance(number, bool)


def first_of(results: Any) -> tvm.runtime.Tensor:
    """Give the first tensor of a function's results."""
    return results if isinstance(results, tvm.runtime.Tensor) else results[0]


def last_rows(ids: np.ndarray, lengths: Any) -> np.ndarray | int:
    """Give the last position of each sequence of ids [B, T]. Raises UserError for lengths that are no [B] of 1 to T."""
    return LAST if lengths is None else rows_at(ids, lengths)


def rows_at(ids: np.ndarray, lengths: Any) -> np.ndarray:
    """Give the position of the last token of each sequence of ids [B, T]. Raises UserError as `last_rows`."""
    lengths = as_array("lengths", lengths)
    B, T = ids.shape
    if lengths.shape != (B,) or lengths.dtype.kind not in "iu" or lengths.min() < 1 or lengths.max() > T:
        raise UserError(f"lengths={lengths.tolist()}: must be {B} whole numbers from 1 to {T}")
    return lengths - 1


def _rows_of(array: np.ndarray, rows: np.ndarray | int) -> np.ndarray:
    """Take [B, T, …] at position rows[b] of each sequence, or at -1 of all: [B, 1, …]."""
    return array[:, rows:] if isinstance(rows, int) else array[np.arange(len(array)), rows][:, None]
