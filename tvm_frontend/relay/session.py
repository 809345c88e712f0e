"""Runs a model compiled by Relay in a process of its environment; ids and logits pass through shared memory."""

import mmap
import os
import weakref
from typing import Any

import numpy as np

from gpt.cli import UserError
from tvm_frontend.artifact import GRAPH, REMAKE, WEIGHTS, CompiledModel
from tvm_frontend.relay.process import RelayProcess
from tvm_frontend.runtime.exclusive import Exclusive, exclusive

START_DEADLINE_S, RUN_DEADLINE_S = 120.0, 600.0


class RelaySession(Exclusive):
    """Runs a forward pass by Relay's graph executor, for the one [B, T] that it was compiled for.

    arch: the arch of this machine's GPU that the model runs on, None for the CPU.
    """

    def __init__(self, model: CompiledModel, threads: int, arch: str | None) -> None:
        super().__init__()
        self.model, path = model, model.path.resolve()
        if model.fixed_shape is None:
            raise UserError(f"{model.path}: compiled by Relay, and for no fixed shape; {REMAKE}")
        shape = tuple(model.fixed_shape)
        logits_bytes = 4 * shape[0] * shape[1] * model.gpt.vocab_size
        ids_at = -(-logits_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        file = os.memfd_create("relay")
        try:
            os.ftruncate(file, ids_at + 8 * shape[0] * shape[1])
            memory = mmap.mmap(file, 0)
            self._ids = np.ndarray(shape, np.int64, memory, ids_at)
            variables = {"TVM_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
            self._process = RelayProcess(variables, files=(file,))
            weakref.finalize(self, self._process.close)
            answer = self._process.ask(
                "start",
                START_DEADLINE_S,
                library=str(model.library(arch).resolve()),
                graph=str(path / GRAPH),
                weights=str(path / WEIGHTS),
                table=model.weights,
                kind=model.target["kind"],
                memory=file,
                ids_at=ids_at,
                ids_shape=shape,
            )
            self._logits = np.ndarray(answer["logits_shape"], np.float32, memory)
        finally:
            os.close(file)

    @exclusive
    def prefill(self, ids: Any) -> np.ndarray:
        """Compute the logits at every position: ids int64 [B, T], of the one shape → float32 [B, T, V].

        They are [B, 1, V] if the model was exported for the last position alone. Raises UserError for other ids, and if
        the process is lost.
        """
        self._ids[...] = self.model.check_ids(ids)
        self._process.ask("run", RUN_DEADLINE_S)
        return self._logits.copy()  # the next call, perhaps of another thread, overwrites it
