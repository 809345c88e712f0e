"""An exported file in ONNX Runtime's CPU provider, called as its form wants it, its inputs checked before they run."""

import numpy as np
import onnxruntime
from ml_dtypes import bfloat16
from onnx import TensorProto
from onnxruntime import OrtValue

from export.artifact import ExportedModel
from gpt.cli import UserError
from gpt.tokenizer import check_ids

PROVIDERS = ["CPUExecutionProvider"]
UNWRITTEN = 9.0  # fills a new cache: beyond the tokens written it must not matter


class Session:
    """An export in memory. It keeps the cache, if the form has one; `start` empties it.

    lengths: int64 [B], the tokens that each sequence has in the cache.
    """

    def __init__(self, exported: ExportedModel) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # it warns of every graph that is not run in place
        self._session = onnxruntime.InferenceSession(str(exported.path), options, providers=PROVIDERS)
        self.exported = exported
        described = exported.entry_points[exported.form]
        self._inputs, self._outputs = described["inputs"], described["outputs"]
        self.start(1)

    def start(self, B: int) -> None:
        """Empty the cache, for B sequences."""
        self.lengths = np.zeros(B, np.int64)
        sizes = {"B": B, "P": 0}
        self._memory = {
            name: np.full([sizes.get(dim, dim) for dim in dims], UNWRITTEN, bfloat16 if dtype == "bfloat16" else dtype)
            for name, (dtype, dims) in self._inputs.items()
            if len(dims) == 4
        }  # OrtValues only borrow it
        self._cache = {name: _ort_value(array) for name, array in self._memory.items()}

    def step(self, ids: np.ndarray) -> np.ndarray:
        """Return logits float32 [B, T, V], or [B, 1, V] of the last, of ids int64 [B, T] behind what the cache holds.

        `lengths` may be set before, to fewer tokens than were given: what was padding is overwritten. Raises UserError,
        before anything runs, for ids of another shape, dtype or range, and where a sequence would exceed block_size.
        """
        check_step(ids, self.lengths, self.exported)
        binding = self._session.io_binding()
        ids_name = next(iter(self._inputs))
        binding.bind_cpu_input(ids_name, np.ascontiguousarray(ids))
        if "pos" in self._inputs:
            binding.bind_cpu_input("pos", self.lengths)
        for name, value in self._cache.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            if name.startswith("cache_out."):  # in place: the same memory goes in and comes out
                binding.bind_ortvalue_output(name, self._cache[name.replace("cache_out.", "cache.")])
            else:
                binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        found = dict(zip(self._outputs, binding.get_outputs(), strict=True))
        if self._cache:
            self.lengths = self.lengths + ids.shape[1]
        if self.exported.form == "past":
            self._cache = {name: found[name.replace("past_key_values", "present")] for name in self._cache}
        elif "pos_out" in found and not np.array_equal(found["pos_out"].numpy(), self.lengths):
            raise RuntimeError(f"{self.exported.path}: pos_out is {found['pos_out'].numpy()}, not {self.lengths}")
        return found["logits"].numpy()


def check_step(ids: np.ndarray, lengths: np.ndarray, exported: ExportedModel) -> None:
    """Raise UserError unless ids [B, T] may follow `lengths` [B] tokens; a kernel would write out of bounds unasked."""
    block_size, B = exported.config.block_size, len(lengths)
    if ids.ndim != 2 or not 1 <= ids.shape[1] <= block_size:
        raise UserError(f"ids of shape {list(ids.shape)}: must be [B, T] with T from 1 to {block_size}")
    if ids.dtype != np.int64:
        raise UserError(f"ids of dtype {ids.dtype}: must be int64")
    check_ids(ids, exported.config.vocab_size)
    if exported.form == "forward":
        return
    if len(ids) != B or lengths.dtype != np.int64:
        raise UserError(f"{len(ids)} sequences of ids for a cache of {B}: start({len(ids)}) makes one for them")
    if lengths.min() < 0 or lengths.max() + ids.shape[1] > block_size:
        raise UserError(
            f"{ids.shape[1]} tokens behind {lengths.tolist()} in the cache: they must fit in block_size={block_size}"
        )
    if exported.form == "past" and len(set(lengths.tolist())) > 1:
        raise UserError(f"sequences of {lengths.tolist()} tokens: a past has one length for all; export --cache static")


def _ort_value(array: np.ndarray) -> OrtValue:
    if array.dtype == bfloat16:
        return OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), TensorProto.BFLOAT16)
    return OrtValue.ortvalue_from_numpy(array)
