"""Runs prompts by Relay, TVM's former importer, on the exported file without a cache, not tuned."""

from typing import ClassVar

import numpy as np

from bench.backends import Variant
from bench.backends.relay import RelayEngine
from bench.gpu.clock import sample_queues
from bench.gpu.device import DeviceArtifacts
from bench.models.artifacts import DEVICE_RELAY


class Engine(RelayEngine[DeviceArtifacts]):
    """Runs a module for each prompt that is timed, with the last logits alone. Without a cache it has no next token.

    Its environment has no torch: the clock is TVM's, whose events on a GPU are CUDA's.
    """

    summary = "Relay of TVM 0.17 on the exported file, all of its own optimisations, not tuned; no KV cache"
    variants: ClassVar[dict[str, Variant]] = {"O3": Variant({"first-token": DEVICE_RELAY.format("{target}")})}
    any_shape: ClassVar[bool] = False

    def samples(self, method: str, arguments: tuple, budget_s: float) -> list[float]:
        """Time some calls of `fill` by the device's clock, with the ids there before it starts: the seconds of each."""
        (ids,) = arguments
        getattr(self, method)(ids)  # refuses what does not fit
        return sample_queues(self._at(ids.shape).seconds, budget_s)

    def notes(self) -> dict[str, str]:
        """Say for the results that there is no cache."""
        return {"KV cache": "none: a prompt's keys and values are not kept"}

    def _load(self, artifacts: DeviceArtifacts, threads: int) -> None:
        file = self.variant.files["first-token"].format(target=artifacts.target)
        self._start(artifacts.folder / file, None if artifacts.device == "cpu" else artifacts.target)

    def _fill(self, ids: np.ndarray) -> np.ndarray:
        return self._prefill(ids)[:, 0]
