"""Runs the exported file with a cache by ONNX Runtime's CUDA and TensorRT providers, all bound on the device."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from bench.backends import Variant
from bench.gpu.device import DeviceArtifacts
from bench.gpu.engine import DeviceEngine, Inputs
from bench.gpu.phases import DEVICE_PHASES
from bench.models.artifacts import DEVICE_CACHED
from gpt.cli import UserError

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, IOBinding
    from torch import Tensor

PACKAGE = "onnxruntime-gpu"
CUDA, TENSORRT, CPU = "CUDAExecutionProvider", "TensorrtExecutionProvider", "CPUExecutionProvider"
ELEMENTS = {"bfloat16": 16, "float16": 10, "float32": 1, "int64": 7}  # ONNX's TensorProto.DataType
KEPT = 2  # sessions of a prompt and of a step, each of which holds the weights


def _files(precision: str) -> dict[str, str]:
    return dict.fromkeys(DEVICE_PHASES, DEVICE_CACHED.format(f"-{precision}"))


@dataclass
class _Bound:
    """A session of one shape with the inputs and outputs bound to it: pos_out [B], logits [B, 1, V]."""

    session: "InferenceSession"
    binding: "IOBinding"
    inputs: Inputs
    pos_out: "Tensor"
    logits: "Tensor"


class Engine(DeviceEngine):
    """Opens a session for each shape, so that no shape arithmetic is left, which ONNX Runtime would do on the CPU.

    Nothing may run on the CPU, to which ONNX Runtime silently falls back from other providers. float16 costs what
    bfloat16 does, and more of the providers' kernels support it.
    """

    requires: ClassVar[dict[str, str]] = {"onnxruntime": PACKAGE, "torch": "torch"}
    summary = "ONNX Runtime on the exported file, inputs, results and the KV cache bound on the device"
    variants: ClassVar[dict[str, Variant]] = {
        "CUDA bf16": Variant(_files("bf16"), "bf16", about="CUDA provider"),
        "CUDA fp16": Variant(_files("fp16"), "fp16", about="CUDA provider"),
        "TensorRT fp16": Variant(
            _files("fp16"), "fp16", {"tensorrt": "tensorrt-cu13"}, about="TensorRT provider, and CUDA's for the rest"
        ),
    }
    any_shape = False

    def _load(self, artifacts: DeviceArtifacts, threads: int) -> None:
        import torch

        self._path, self._threads = artifacts.folder / self.variant.files["decode"], threads
        self._dtype = getattr(torch, {"bf16": "bfloat16", "fp16": "float16"}[self.variant.precision])
        self._bound: dict[tuple[int, int], _Bound] = {}
        self._cache: dict[str, Tensor] = {}
        if self.device == "cuda":
            torch.cuda.set_stream(torch.cuda.Stream())  # the providers accept any user stream but the default one
        self._wanted()

    def notes(self) -> dict[str, str]:
        """Name the providers of the sessions, without the CPU's, which every session has and may not use."""
        names = dict.fromkeys(name for each in self._bound.values() for name in each.session.get_providers())
        return {"providers": ", ".join(name for name in names if name != CPU or self.device == "cpu")}

    def _first(self, ids: "Tensor") -> "Tensor":
        import torch

        if not self._cache or len(next(iter(self._cache.values()))) != len(ids):
            shape = (len(ids), self.gpt.n_head, self.config.block_size, self.gpt.head_size)
            self._bound.clear()
            self._cache = {
                f".{layer}.{part}": torch.zeros(shape, dtype=self._dtype, device=self.device)
                for layer in range(self.gpt.n_layer)
                for part in ("key", "value")
            }
        return self._next(ids, 0)

    def _next(self, ids: "Tensor", context: int) -> "Tensor":
        import onnxruntime

        B, T = ids.shape
        if (B, T) not in self._bound:
            while len(self._bound) >= KEPT:
                del self._bound[next(iter(self._bound))]
            self._bound[B, T] = self._bind(B, T)
        bound, options = self._bound[B, T], onnxruntime.RunOptions()
        bound.inputs.hold(ids, context)
        if self.device == "cuda":
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        bound.session.run_with_iobinding(bound.binding, options)
        return bound.logits[:, 0]

    def _bind(self, B: int, T: int) -> "_Bound":
        """Open a session for a shape with all bound on the device; each cache tensor is input and output at once."""
        import torch

        session = self._open(B, T)
        found = _Bound(
            session,
            session.io_binding(),
            Inputs(
                ids=torch.zeros((B, T), dtype=torch.int64, device=self.device),
                pos=torch.zeros(B, dtype=torch.int64, device=self.device),
            ),
            pos_out=torch.zeros(B, dtype=torch.int64, device=self.device),
            logits=torch.empty((B, 1, self.config.vocab_size), dtype=torch.float32, device=self.device),
        )
        caches = self._cache.items()
        inputs = {"ids": found.inputs.ids, "pos": found.inputs.pos}
        inputs |= {f"cache{name}": tensor for name, tensor in caches}
        outputs = {"logits": found.logits, "pos_out": found.pos_out}
        outputs |= {f"cache_out{name}": tensor for name, tensor in caches}
        for bind, tensors in ((found.binding.bind_input, inputs), (found.binding.bind_output, outputs)):
            for name, tensor in tensors.items():
                element = ELEMENTS[str(tensor.dtype).removeprefix("torch.")]
                bind(name, self.device, 0, element, list(tensor.shape), tensor.data_ptr())
        return found

    def _open(self, B: int, T: int) -> "InferenceSession":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self._threads, 1
        for name, size in (("B", B), ("T", T)):
            options.add_free_dimension_override_by_name(name, size)
        providers = self._wanted()
        if self.device == "cuda":
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        session = onnxruntime.InferenceSession(str(self._path), options, providers=providers)
        refuse_fallback([name for name, _ in providers], session.get_providers())
        return session

    def _wanted(self) -> list[tuple[str, dict[str, str]]]:
        """List the providers to ask for, with their options. Raises UserError if ONNX Runtime lacks one."""
        import onnxruntime
        import torch

        if self.device == "cpu":
            return [(CPU, {})]
        onnxruntime.preload_dlls()
        names = [CUDA]
        if "TensorRT" in self.variant_name:
            import tensorrt  # noqa: F401 (it loads the libraries that the provider links)

            names = [TENSORRT, CUDA]
        for name in names:
            if name not in onnxruntime.get_available_providers():
                raise UserError(f"onnxruntime {onnxruntime.__version__} has no {name}: pip install {PACKAGE}")
        stream = {"user_compute_stream": str(torch.cuda.current_stream().cuda_stream)}
        return [(name, stream | ({"trt_fp16_enable": "1"} if name == TENSORRT else {})) for name in names]

    def versions(self) -> dict[str, str]:
        import onnxruntime

        return {"onnxruntime": onnxruntime.__version__}


def refuse_fallback(wanted: list[str], got: list[str]) -> None:
    """Raise RuntimeError unless a session has the providers that were asked for, before the CPU's.

    ONNX Runtime falls back to others without raising, and adds the CPU's after all.
    """
    if got[: len(wanted)] != wanted:
        raise RuntimeError(f"asked for {', '.join(wanted)}, got {', '.join(got)}")
