"""Runs the exported files compiled by TVM: O0 is TVM's own untuned pipeline, O3 has this project's kernels."""

from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from bench.backends import Backend, Variant, in_float32
from bench.correctness.rounding import Rounding, by_32, by_row, int4_by_32
from bench.models.artifacts import COMPILED_CACHED, COMPILED_LOW, COMPILED_O0, COMPILED_O3, Artifacts

if TYPE_CHECKING:
    from tvm_frontend.artifact import CompiledModel


def _files(forward: str, with_cache: str) -> dict[str, str]:
    return {"prefill": forward, "decode": with_cache, "generate": with_cache}


def _low(precision: str, about: str, rounding: Rounding | None = None) -> Variant:
    forward, with_cache = (name.format(precision) for name in COMPILED_LOW)
    return Variant(_files(forward, with_cache), precision, about=about, rounding=rounding)


class Engine(Backend[Artifacts]):
    """Runs compiled artifacts, each of which serves all shapes, without ONNX or torch."""

    requires: ClassVar[dict[str, str]] = {"tvm": "apache-tvm"}
    summary = "TVM on the exported files: O0 its own untuned pipeline, O3 this project's schedules, a KV cache in place"
    variants: ClassVar[dict[str, Variant]] = {
        "O0": Variant({"prefill": COMPILED_O0}),
        "O3": Variant(_files(COMPILED_O3, COMPILED_CACHED)),
        "O3 bf16": _low("bf16", "products of bfloat16"),
        "O3 int8": _low(
            "int8", "weights and activations of products in 8 bits", Rounding(by_row, by_row, cached=by_row)
        ),
        "O3 int4": _low("int4", "weights of products in 4 bits", Rounding(int4_by_32, by_32, cached=by_row)),
    }

    def _load(self, artifacts: Artifacts, threads: int) -> None:
        self._artifacts, self._threads = artifacts, threads

    def _prefill(self, ids: np.ndarray) -> np.ndarray:
        return in_float32(self._forward.prefill(ids))

    def _fill(self, ids: np.ndarray) -> np.ndarray:
        return in_float32(self._with_cache.fill(ids))

    def _decode(self, ids: np.ndarray, context: int) -> np.ndarray:
        return in_float32(self._with_cache.decode(ids, context))

    @cached_property
    def _forward(self) -> Any:
        if self._artifacts.onnx is not None:
            from tvm_frontend.runtime import open_session

            return open_session(self._compiled("prefill"), self._threads)
        from bench.models.sessions import open_as
        from tvm_frontend.runtime.session import Session

        return open_as(Session, self._compiled("prefill"), self._threads)

    @cached_property
    def _with_cache(self) -> Any:
        if self._artifacts.onnx is not None:
            return self._forward
        from bench.models.sessions import open_as
        from tvm_frontend.runtime.session import CachedSession

        return open_as(CachedSession, self._compiled("decode"), self._threads)

    def _compiled(self, phase: str) -> "CompiledModel":
        from tvm_frontend.artifact import load_compiled

        return load_compiled(self._artifacts.path(self.variant.files[phase]))

    def versions(self) -> dict[str, str]:
        import tvm

        return {"apache-tvm": tvm.__version__}
