"""Runs the exported file with a cache by TVM: O0 is TVM's own untuned rules, O3 this project's kernels."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from bench.backends import Variant
from bench.gpu.device import DeviceArtifacts
from bench.gpu.engine import DeviceEngine, Inputs
from bench.gpu.phases import DEVICE_PHASES
from bench.models.artifacts import DEVICE_COMPILED

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tvm_frontend.runtime.device_session import DeviceSession


def _files(level: int) -> dict[str, str]:
    return dict.fromkeys(DEVICE_PHASES, DEVICE_COMPILED[level].format("{target}"))


@dataclass
class _Recorded:
    """A call recorded as a CUDA graph, with its inputs and the logits [B, V] that it writes."""

    graph: "torch.cuda.CUDAGraph"
    inputs: Inputs
    logits: "Tensor"


class Engine(DeviceEngine):
    """Runs the compiled artifacts, each for all shapes. torch only holds the inputs and provides the clock.

    A prompt and a step are recorded as CUDA graphs, as the session's own `generate` records them. The session of an
    untuned model, and any on a CPU, takes and returns arrays of the host; their copies are then part of its time.
    """

    requires: ClassVar[dict[str, str]] = {"tvm": "apache-tvm", "torch": "torch"}
    summary = "TVM on the exported file: O0 its own untuned rules, O3 this project's; a KV cache in place"
    variants: ClassVar[dict[str, Variant]] = {"O0": Variant(_files(0)), "O3": Variant(_files(1), "bf16")}

    def _load(self, artifacts: DeviceArtifacts, threads: int) -> None:
        import torch

        from bench.models.sessions import open_as
        from tvm_frontend.artifact import load_compiled
        from tvm_frontend.runtime.device_session import DeviceSession
        from tvm_frontend.runtime.session import CachedSession

        model = load_compiled(artifacts.folder / self.variant.files["decode"].format(target=artifacts.target))
        kind = {"cuda": "cuda", "cpu": "llvm"}[self.device]
        if model.target["kind"] != kind:
            raise RuntimeError(f"{model.path} was compiled for {model.target['kind']}, and is to run on {self.device}")
        self._session, self._target = open_as(CachedSession, model, threads), artifacts.target
        self._on_device = self._session if isinstance(self._session, DeviceSession) else None
        self._B = 0
        self._recorded: dict[tuple[str | int, ...], _Recorded] = {}
        if self.device == "cuda":
            torch.cuda.set_stream(torch.cuda.Stream())  # nothing can be recorded on the default stream

    def notes(self) -> dict[str, str]:
        how = "recorded as CUDA graphs" if self._on_device else "ids and logits by way of the host"
        return {"compiled for": self._target, "calls": how}

    def _first(self, ids: "Tensor") -> "Tensor":
        if self._on_device is None:
            return self._from_host(self._session.fill(ids.cpu().numpy()))
        self._begin(len(ids))
        return self._run(self._on_device, "fill", ids, ids.shape[1] - 1)

    def _next(self, ids: "Tensor", context: int) -> "Tensor":
        if self._on_device is None:
            return self._from_host(self._session.decode(ids.cpu().numpy(), context))
        return self._run(self._on_device, "decode", ids, context)

    def _tokens(self, ids: "Tensor", tokens: int) -> "Tensor":
        """Generate by the session's own loop, if it has one, which chooses on the device too."""
        if self._on_device is None:
            return super()._tokens(ids, tokens)
        self._begin(len(ids))
        return self._from_host(self._on_device.generate(ids.cpu().numpy(), tokens))

    def _begin(self, B: int) -> None:
        if B != self._B:
            self._recorded.clear()  # they write to the old cache
            self._session.begin(B)
            self._B = B

    def _run(self, session: "DeviceSession", method: str, ids: "Tensor", pos: int) -> "Tensor":
        """Replay a call, recorded first if it is new. pos: the position of a step, or the last one of a prompt."""
        key = (method, *ids.shape)
        if key not in self._recorded:
            self._recorded[key] = self._record(session, method, ids, pos)
        found = self._recorded[key]
        found.inputs.hold(ids, pos)
        found.graph.replay()
        return found.logits

    def _record(self, session: "DeviceSession", method: str, ids: "Tensor", pos: int) -> "_Recorded":
        import torch
        import tvm
        import tvm_ffi

        stream = torch.cuda.current_stream()
        inputs = Inputs(ids.clone(), torch.full((len(ids),), pos, dtype=torch.int64, device=self.device))
        calls: dict[str, Callable[..., tvm.runtime.Tensor]] = {
            "fill": session.fill_on_device,
            "decode": session.decode_on_device,
        }
        call = calls[method]
        given = [tvm.runtime.from_dlpack(tensor) for tensor in (inputs.ids, inputs.pos)]
        graph = torch.cuda.CUDAGraph()
        with tvm_ffi.use_raw_stream(tvm_ffi.device("cuda", 0), stream.cuda_stream):
            call(*given)  # allocates all memory
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="relaxed"):
                logits = call(*given)  # [B, 1, V]
        return _Recorded(graph, inputs, torch.from_dlpack(logits)[:, 0])

    def _from_host(self, array: np.ndarray) -> "Tensor":
        import torch

        return torch.from_numpy(array).to(self.device)

    def versions(self) -> dict[str, str]:
        import tvm

        return {"apache-tvm": tvm.__version__}
