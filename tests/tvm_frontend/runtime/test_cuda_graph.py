import ctypes
import subprocess

import pytest

from tvm_frontend.runtime import cuda_graph
from tvm_frontend.runtime.cuda_graph import Stream

# NVIDIA's driver as far as it is used, which notes what it is asked; `fail` makes the functions of that name fail.
DRIVER = r"""
#include <string>
static std::string said, failing;
extern "C" {
const char* what_was_said() { return said.c_str(); }
void begin_with(const char* name) { said.clear(); failing = name; }
static int note(const char* name, const std::string& words) {
  said += std::string(name) + words + "\n";
  return failing == name ? 900 : 0;
}
static std::string number(size_t value) { return " " + std::to_string(value); }
int cuGetErrorName(int code, const char** name) {
  *name = "CUDA_ERROR_OF_THE_TEST";
  return 0;
}
int cuStreamCreate(size_t* stream, unsigned flags) {
  *stream = 7000000000;
  return note("cuStreamCreate", number(flags));
}
int cuStreamBeginCapture_v2(size_t stream, int mode) {
  return note("cuStreamBeginCapture_v2", number(stream) + number(mode));
}
int cuStreamEndCapture(size_t stream, size_t* graph) {
  *graph = 8000000000;
  return note("cuStreamEndCapture", number(stream));
}
int cuGraphInstantiateWithFlags(size_t* made, size_t graph, unsigned long long flags) {
  *made = 9000000000;
  return note("cuGraphInstantiateWithFlags", number(graph) + number(flags));
}
int cuGraphDestroy(size_t graph) { return note("cuGraphDestroy", number(graph)); }
int cuGraphLaunch(size_t made, size_t stream) { return note("cuGraphLaunch", number(made) + number(stream)); }
int cuGraphExecDestroy(size_t made) { return note("cuGraphExecDestroy", number(made)); }
int cuStreamSynchronize(size_t stream) { return note("cuStreamSynchronize", number(stream)); }
void work() { note("work", ""); }
}
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    folder = tmp_path_factory.mktemp("driver")
    (folder / "driver.cc").write_text(DRIVER)
    command = ["g++", "-shared", "-fPIC", str(folder / "driver.cc"), "-o", str(folder / "libcuda.so.1")]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(folder / "libcuda.so.1"))
    library.what_was_said.restype = ctypes.c_char_p
    return library


@pytest.fixture
def said(driver, monkeypatch):
    """Put the test's driver in the place of NVIDIA's; gives what it was asked so far, line by line."""
    monkeypatch.setattr(cuda_graph.ctypes, "CDLL", lambda name: driver)
    driver.begin_with(b"")
    return lambda: driver.what_was_said().decode().splitlines()


def test_work_is_recorded_once_and_run_as_often_as_asked(driver, said):
    stream = Stream()
    recording = stream.record(driver.work)
    recording.run()
    recording.run()
    stream.synchronize()
    del recording
    assert said() == [
        "cuStreamCreate 0",
        "cuStreamBeginCapture_v2 7000000000 2",
        "work",
        "cuStreamEndCapture 7000000000",
        "cuGraphInstantiateWithFlags 8000000000 0",
        "cuGraphDestroy 8000000000",
        "cuGraphLaunch 9000000000 7000000000",
        "cuGraphLaunch 9000000000 7000000000",
        "cuStreamSynchronize 7000000000",
        "cuGraphExecDestroy 9000000000",
    ]


def test_what_the_driver_refuses_is_named(driver, said):
    stream = Stream()
    driver.begin_with(b"cuGraphInstantiateWithFlags")
    with pytest.raises(RuntimeError, match="cuGraphInstantiateWithFlags: CUDA_ERROR_OF_THE_TEST"):
        stream.record(driver.work)
    assert said()[-1] == "cuGraphDestroy 8000000000"


def test_a_recording_ends_also_if_the_work_fails(said):
    def fail():
        raise ValueError("of the work")

    with pytest.raises(ValueError, match="of the work"):
        Stream().record(fail)
    assert said()[-1] == "cuStreamEndCapture 7000000000"
