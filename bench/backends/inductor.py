"""torch.compile with its default backend, the model compiled anew for each shape so that it knows them all."""

import numpy as np

from bench.artifacts import Artifacts
from bench.backends import eager


class Engine(eager.Engine):
    """torch.compile over the model with fused attention. The first call at a shape compiles; it is never timed."""

    summary = "torch.compile, one compilation a shape"
    attention = "sdpa"

    def load(self, artifacts: Artifacts, threads: int, variant: str) -> None:
        import torch
        import torch._dynamo
        import torch._inductor.config

        super().load(artifacts, threads, variant)
        # By default the ninth shape would fall back to eager without a word.
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        torch._inductor.config.compile_threads = 1  # no pool of compiling processes left beside the measurement
        self._model = torch.compile(self._model, dynamic=False, fullgraph=True)

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        import torch

        with torch.no_grad():  # inference_mode would be one more thing to guard on
            return self._model(torch.from_numpy(ids)).numpy()
