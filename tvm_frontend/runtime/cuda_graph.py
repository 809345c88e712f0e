"""Work on a GPU that is recorded once and then begun by one call, through NVIDIA's driver.

What it does is the CUDA driver API's: https://docs.nvidia.com/cuda/cuda-driver-api, stream and graph management.
"""

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager

import tvm_ffi

RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED: what is recorded may allocate memory


class Stream:
    """A CUDA stream of TVM's current GPU, which waits for the default stream and makes it wait, but can be recorded."""

    def __init__(self) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._stream = ctypes.c_void_p()
        self.call("cuStreamCreate", ctypes.byref(self._stream), 0)

    def use(self) -> AbstractContextManager:
        """Within the block TVM starts its kernels on this stream."""
        return tvm_ffi.use_raw_stream(tvm_ffi.device("cuda", 0), self._stream.value)

    def record(self, work: Callable[[], object]) -> "Recording":
        """Record the kernels that `work` starts instead of running them.

        It must have run once before, so that all memory is there, and what it reads and writes must stay where it is.
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
        """Begin what was recorded; nothing waits for it."""
        self.call("cuGraphLaunch", executable, self._stream)

    def synchronize(self) -> None:
        """Wait until all that was begun is done."""
        self.call("cuStreamSynchronize", self._stream)

    def call(self, function: str, *arguments: object) -> None:
        """A function of the driver. Raises RuntimeError with its name for the error."""
        if code := getattr(self._driver, function)(*arguments):
            name = ctypes.c_char_p()
            self._driver.cuGetErrorName(code, ctypes.byref(name))
            raise RuntimeError(f"{function}: {name.value.decode() if name.value else f'error {code}'}")


class Recording:
    """Recorded work, a CUDA graph."""

    def __init__(self, stream: Stream, executable: ctypes.c_void_p) -> None:
        self._stream, self._executable = stream, executable

    def run(self) -> None:
        """Begin the work; nothing waits for it."""
        self._stream.launch(self._executable)

    def __del__(self) -> None:
        self._stream.call("cuGraphExecDestroy", self._executable)
