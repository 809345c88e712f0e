"""Records work on a GPU once as a CUDA graph and then launches it by one call, through NVIDIA's driver.

The calls are those of the CUDA driver API: https://docs.nvidia.com/cuda/cuda-driver-api, stream and graph management.
"""

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager

import tvm_ffi

RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED: the recorded work may allocate memory


class Stream:
    """A CUDA stream of TVM's current GPU, which waits for the default stream and makes it wait, but can be recorded."""

    def __init__(self) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._stream = ctypes.c_void_p()
        self.call("cuStreamCreate", ctypes.byref(self._stream), 0)

    def use(self) -> AbstractContextManager:
        """Have TVM launch its kernels on this stream within the block."""
        return tvm_ffi.use_raw_stream(tvm_ffi.device("cuda", 0), self._stream.value)

    def record(self, work: Callable[[], object]) -> "Recording":
        """Record the kernels that `work` launches instead of running them.

        It must have run once before, so that all memory is allocated, and its tensors must stay where they are.
        """
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        with self.use():
            self.call("cuStreamBeginCapture_v2", self._stream, RELAXED)
            try:
                work()
            finally:
                self.call("cuStreamEndCapture", self._stream, ctypes.byref(graph))
        try:
            self.call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        finally:
            self.call("cuGraphDestroy", graph)
        return Recording(self, executable)

    def launch(self, executable: ctypes.c_void_p) -> None:
        """Launch a recorded graph without waiting for it."""
        self.call("cuGraphLaunch", executable, self._stream)

    def synchronize(self) -> None:
        """Wait until all work on the stream is done."""
        self.call("cuStreamSynchronize", self._stream)

    def call(self, function: str, *arguments: object) -> None:
        """Call a function of the driver. Raises RuntimeError with the driver's name for the error."""
        if code := getattr(self._driver, function)(*arguments):
            name = ctypes.c_char_p()
            self._driver.cuGetErrorName(code, ctypes.byref(name))
            raise RuntimeError(f"{function}: {name.value.decode() if name.value else f'error {code}'}")


class Recording:
    """Holds recorded work, a CUDA graph."""

    def __init__(self, stream: Stream, executable: ctypes.c_void_p) -> None:
        self._stream, self._executable = stream, executable

    def run(self) -> None:
        """Launch the work without waiting for it."""
        self._stream.launch(self._executable)

    def __del__(self) -> None:
        self._stream.call("cuGraphExecDestroy", self._executable)
