"""TVM on the exported file with a cache: O0 is TVM's own untuned rules, O3 this project's rewrites and kernels."""

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from bench.artifacts import DEVICE_COMPILED
from bench.backends import Variant
from bench.gpu.device import DeviceArtifacts
from bench.gpu.engine import DeviceEngine
from bench.gpu.engines import PHASES

if TYPE_CHECKING:
    import tvm
    from torch import Tensor


def _files(level: int) -> dict[str, str]:
    return dict.fromkeys(PHASES, DEVICE_COMPILED[level].format("{target}"))


class Engine(DeviceEngine):
    """The compiled artifacts, each for all shapes. torch is there to hold what goes in and for its clock alone."""

    requires: ClassVar[dict[str, str]] = {"tvm": "apache-tvm", "torch": "torch"}
    summary = "TVM on the exported file: O0 its own untuned rules, O3 this project's; a KV cache in place"
    variants: ClassVar[dict[str, Variant]] = {"O0": Variant(_files(0)), "O3": Variant(_files(1), "bf16")}

    def _load(self, artifacts: DeviceArtifacts, threads: int) -> None:
        from tvm_frontend.artifact import load_compiled

        model = load_compiled(artifacts.folder / self.variant.files["decode"].format(target=artifacts.target))
        kind = {"cuda": "cuda", "cpu": "llvm"}[self.device]
        if model.target["kind"] != kind:
            raise RuntimeError(f"{model.path} was compiled for {model.target['kind']}, and is to run on {self.device}")
        self._session, self._target = model.start(threads), artifacts.target

    def notes(self) -> dict[str, str]:
        return {"compiled for": self._target}

    def _first(self, ids: "Tensor") -> "Tensor":
        if self.device == "cpu":
            return self._from_numpy(self._session.fill(ids.numpy()))
        return self._to_torch(self._session.fill_on_device(self._from_torch(ids)))

    def _next(self, ids: "Tensor", context: int) -> "Tensor":
        if self.device == "cpu":
            return self._from_numpy(self._session.decode(ids.numpy(), context))
        pos = self._from_torch(self._pos(len(ids), context))
        return self._to_torch(self._session.decode_on_device(self._from_torch(ids), pos))

    def _tokens(self, ids: "Tensor", tokens: int) -> "Tensor":
        """By the session's own loop where there is a GPU, which chooses on the device too."""
        if self.device == "cpu":
            return super()._tokens(ids, tokens)
        return self._from_numpy(self._session.generate(ids.cpu().numpy(), tokens, top_k=1))

    def _from_torch(self, tensor: "Tensor") -> "tvm.runtime.Tensor":
        import tvm

        return tvm.runtime.from_dlpack(tensor)

    def _to_torch(self, tensor: "tvm.runtime.Tensor") -> "Tensor":
        import torch

        return torch.from_dlpack(tensor)

    def _from_numpy(self, array: np.ndarray) -> "Tensor":
        import torch

        return torch.from_numpy(array)

    def versions(self) -> dict[str, str]:
        import tvm

        return {"apache-tvm": tvm.__version__}
