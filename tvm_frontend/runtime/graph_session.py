"""Runs a file that was compiled as it is: by its own inputs and outputs, or by token ids alone, with its KV cache.

Most calls give a mask of ones and positions that count on, which say nothing that the shapes do not. For these the
artifact has a second library, compiled with that known: there a mask may be the causal one, which a kernel knows. And
where the file's KV cache grows by a copy of all of it in every step, a third one may have it preallocated, see
`tvm_frontend.passes.preallocate`.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import tvm

from export.signature import COUNTED, SEEN, Port, Signature, check_shape, dtype_named
from gpt.cli import UserError
from gpt.tokenizer import check_ids
from tvm_frontend.artifact import CACHED, PLAIN, CompiledModel, as_array
from tvm_frontend.runtime.exclusive import exclusive
from tvm_frontend.runtime.session import CachedSession, Loaded
from tvm_frontend.runtime.threads import use_threads

Array: TypeAlias = np.ndarray | tvm.runtime.Tensor


class GraphSession(Loaded):
    """Runs a compiled file.

    `run` takes what the file takes and gives what it gives. `prefill`, `fill` and `decode` take token ids, and are
    for files whose inputs and logits are known, as `export.signature.Signature` says. Keys and values of earlier
    tokens stay on the device between steps.
    """

    def __init__(self, model: CompiledModel, threads: int, arch: str | None) -> None:
        if model.signature is None:
            raise UserError(f"{model.path}: damaged, it does not say how it is called")
        self.signature: Signature = model.signature
        super().__init__(model, threads, model.library(arch))
        cached = model.with_cache()
        self._plain = Loaded(model, threads, model.library(arch, PLAIN), PLAIN) if PLAIN in model.parts else None
        self._cached = CachedSession(cached, threads, model.library(arch, CACHED), CACHED) if cached else None

    def _make_own(self) -> None:
        super()._make_own()
        self._past: dict[str, tvm.runtime.Tensor] = {}
        self._filled = (0, 0)  # the sequences and the tokens of each that the past holds
        self._for_prefill: CachedSession | None = None
        self._prefilled = 0  # the sequences that its cache is of

    @exclusive
    def clone(self) -> "GraphSession":
        """Do as `Loaded.clone`."""
        other = super().clone()
        other._plain = self._plain and self._plain.clone()
        other._cached = self._cached and self._cached.clone()
        return other

    @exclusive
    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute all outputs, by name, from all inputs, by name, in the file's types.

        Raises UserError for a name, type or shape that the file does not take, and ids that are not in its vocabulary.
        """
        return {name: result.numpy() for name, result in self._results(self._checked(inputs)).items()}

    @exclusive
    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """Compute logits [B, T, V] of ids int64 [B, T], or [B, 1, V] if the file gives the last alone, without a past.

        Raises UserError for a file whose inputs or logits are not known, and for ids that it does not take.
        """
        if self._cached is None:
            return self._logits(self._step(ids, None)).numpy()
        ids = self.model.check_ids(ids)
        if self._for_prefill is None:  # with a cache of its own, as one that is being continued stays as it is
            self._for_prefill = self._cached.clone()
        if len(ids) != self._prefilled:
            self._for_prefill.begin(len(ids))
            self._prefilled = len(ids)
        return self._for_prefill.step(ids, np.zeros(len(ids), np.int64))

    @exclusive
    def fill(self, ids: np.ndarray) -> np.ndarray:
        """Begin anew with a prompt, ids int64 [B, T]; return logits [B, V] of its last position. Raises UserError."""
        if self._cached is not None:
            return self._cached.fill(ids)
        self._keep(results := self._step(ids, None), ids, 0)
        return self._logits(results).numpy()[:, -1]

    @exclusive
    def decode(self, ids: np.ndarray, context: int) -> np.ndarray:
        """Compute logits [B, V] of one token each, ids int64 [B, 1], after the first `context` tokens of the past.

        Raises UserError for a file without a past, and for a context that it does not hold.
        """
        if self._cached is not None:
            return self._cached.decode(ids, context)
        B, filled = self._filled
        if not self._past or not 1 <= context <= filled or len(ids) != B:
            raise UserError(
                f"context={context}: the past holds {filled} tokens of {B} sequences, and `fill` puts them there"
            )
        past = {name: self._first(name, tensor, context) for name, tensor in self._past.items()}
        self._keep(results := self._step(ids, past), ids, context)
        return self._logits(results).numpy()[:, -1]

    def _first(self, name: str, past: tvm.runtime.Tensor, tokens: int) -> tvm.runtime.Tensor:
        """Give a past of its first tokens alone."""
        axis = self.signature.length_axis(name)
        if past.shape[axis] == tokens:
            return past
        kept = past.numpy()[(slice(None),) * axis + (slice(tokens),)]
        return tvm.runtime.tensor(np.ascontiguousarray(kept), self._device)

    def _keep(self, results: Mapping[str, tvm.runtime.Tensor], ids: np.ndarray, context: int) -> None:
        if not self.signature.past:
            raise UserError(f"{self.model.path}: the file has no KV cache to keep keys and values in")
        self._past = {name: results[present] for name, present in self.signature.presents.items()}
        self._filled = len(ids), context + ids.shape[1]

    def _step(self, ids: np.ndarray, past: Mapping[str, Any] | None) -> dict[str, tvm.runtime.Tensor]:
        ids = as_array("ids", ids)
        if ids.ndim != 2 or not ids.size:
            raise UserError(f"ids of shape {list(ids.shape)}: must be [B, T], with at least one token")
        check_ids(ids, self.signature.vocab_size)
        given = self.signature.feed(ids, past)
        P, T = self._tokens(given)
        self._check_length(P + T)
        self.signature.check_limits(given)
        return self._results(given, plain=self._plain is not None)

    def _logits(self, results: Mapping[str, tvm.runtime.Tensor]) -> tvm.runtime.Tensor:
        if self.signature.logits is None:
            raise UserError(f"{self.model.path}: which of its outputs the logits are could not be told; use `run`")
        return results[self.signature.logits]

    def _results(self, given: Mapping[str, Array], *, plain: bool | None = None) -> dict[str, tvm.runtime.Tensor]:
        """Call the library for what is given, in the file's order, and name its results.

        plain: whether masks are ones and positions count on; None if that is to be seen.
        """
        use_threads(self.threads)
        if plain is None:
            plain = self._plain is not None and self._is_plain(given)
        loaded = self._plain if plain and self._plain is not None else self
        names = [port.name for port in self.signature.inputs if not plain or port.name not in self.signature.plain]
        tensors = [self._tensor(given[name]) for name in names]
        loaded._forget()
        results = loaded._forward(*tensors, loaded._weights)
        outputs = [results] if isinstance(results, tvm.runtime.Tensor) else list(results)
        return dict(zip((port.name for port in self.signature.outputs), outputs, strict=True))

    def _tensor(self, value: Array) -> tvm.runtime.Tensor:
        if isinstance(value, tvm.runtime.Tensor):
            return value
        return tvm.runtime.tensor(np.ascontiguousarray(value), self._device)

    def _checked(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Check inputs against the file's. Raises UserError."""
        names = [port.name for port in self.signature.inputs]
        if wrong := [name for name in (*inputs, *names) if name not in inputs or name not in names]:
            what = "not an input of the file" if wrong[0] in inputs else "missing"
            raise UserError(f"input {wrong[0]}: {what}; it takes {', '.join(names)}")
        given: dict[str, np.ndarray] = {}
        sizes: dict[str, tuple[int, str]] = {}
        for port in self.signature.inputs:
            array = given[port.name] = as_array(port.name, inputs[port.name])
            if array.dtype != dtype_named(port.dtype):
                raise UserError(f"input {port.name} of dtype {array.dtype}: must be {port.dtype}")
            check_shape(port, array.shape)
            self._check_sizes(port, array.shape, sizes)
        if self.signature.ids is not None:
            check_ids(given[self.signature.ids], self.signature.vocab_size)
        self._check_lengths(given)
        self.signature.check_limits(given)
        return given

    def _check_sizes(self, port: Port, shape: tuple[int, ...], sizes: dict[str, tuple[int, str]]) -> None:
        """Raise UserError where a dimension has another size than one of the same name."""
        for dim, size in zip(port.dims, shape, strict=True):
            if isinstance(dim, str):
                known, where = sizes.setdefault(dim, (size, port.name))
                if known != size:
                    raise UserError(f"input {port.name} of shape {list(shape)}: {dim} is {known} in {where}")

    def _check_lengths(self, given: Mapping[str, np.ndarray]) -> None:
        """Raise UserError for more tokens than the file has positions for, and for masks and positions of others."""
        signature = self.signature
        if signature.ids is None or given[signature.ids].ndim != 2:
            return
        P, T = self._tokens(given)
        self._check_length(P + T)
        for name, role in signature.roles.items():
            size = given[name].shape[-1] if given[name].ndim else 1
            if (role == SEEN and size != P + T) or (role == COUNTED and size != T):
                raise UserError(f"input {name} of shape {list(given[name].shape)}: there are {P} + {T} tokens")
            if role == COUNTED and given[name].size and signature.longest is not None:
                least, most = int(given[name].min()), int(given[name].max())
                if least < 0 or most >= signature.longest:
                    raise UserError(f"input {name}: positions must be in 0 … {signature.longest - 1}")

    def _check_length(self, length: int) -> None:
        if self.signature.longest is not None and length > self.signature.longest:
            raise UserError(f"{length} tokens: the model has positions for {self.signature.longest}")

    def _tokens(self, given: Mapping[str, Array]) -> tuple[int, int]:
        """Give the numbers of tokens in the past and of new ones."""
        past = self.signature.past
        P = given[past[0]].shape[self.signature.length_axis(past[0])] if past else 0
        return P, given[self.signature.ids or ""].shape[1]

    def _is_plain(self, given: Mapping[str, np.ndarray]) -> bool:
        """Tell if masks are all ones, positions count on from the past, and what should be zeros is zeros."""
        P, T = self._tokens(given)
        for name in self.signature.plain:
            role, value = self.signature.roles[name], given[name]
            expected = {SEEN: 1, COUNTED: np.arange(P, P + T)}.get(role, 0)
            if not (value == expected).all():
                return False
        return True
