"""Runs in Relay's environment, and imports nothing of this project.

It is started with the number of a socket, and answers each line of JSON there with another. Its output, and TVM prints
much, goes to stdout and stderr, where it is a log and no answer.
"""

import ctypes
import importlib.metadata
import json
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np

NO_KERNEL = "__nop"  # the graph executor's name for a reshape, which it does not call
BATCH = 64  # candidates of a kernel between two updates of the cost model, MetaSchedule's own; fewer for few trials
DATABASE = ("database_workload.json", "database_tuning_record.json")  # MetaSchedule's names


class Refused(Exception):
    """A mistake that the user can mend, in one line."""


def build(request: dict) -> dict:
    """Import an ONNX file for one shape, build it, and write library, graph and weights.

    request: `model` (the file), `shape` [B, T], `target` and `host` (as TVM spells them; host None for the CPU),
    `opt_level`, `library` and `graph` (files to write), `scratch` (a folder for the file `weights` and, if `dump` is
    true, Relay's text before and after it is optimised), `tuning` (None, or `folder`, `trials` and `threads`). Answers
    `phases_s`, `weights` (name, dtype, shape and offset of each), `kernels` (how often a forward pass calls each),
    `trials` and `versions`.
    """
    import onnx
    import tvm
    from tvm import relay

    target = _target_of(request)
    phases_s = {}
    proto = onnx.load(request["model"])
    start = time.perf_counter()
    module, params = relay.frontend.from_onnx(proto, {"ids": tuple(request["shape"])}, freeze_params=True)
    phases_s["import"] = time.perf_counter() - start
    print(f"imported in {phases_s['import']:.1f} s", flush=True)
    level, scratch, tuning = request["opt_level"], Path(request["scratch"]), request["tuning"]
    if request["dump"]:
        (scratch / "01-import.relay").write_text(module.astext(show_meta_data=False))
        with tvm.transform.PassContext(opt_level=level):
            optimized, _ = relay.optimize(module, target=target, params=params)
        (scratch / "02-optimize.relay").write_text(optimized.astext(show_meta_data=False))
    trials = 0
    start = time.perf_counter()
    if tuning is None:
        with tvm.transform.PassContext(opt_level=level):
            factory = relay.build(module, target=target, params=params)
    else:
        from tvm.meta_schedule.relay_integration import compile_relay

        database, trials = _tune(module, params, target, level, tuning)
        phases_s["search"] = time.perf_counter() - start
        start = time.perf_counter()
        factory = compile_relay(database, module, target, params, opt_level=level)
    phases_s["build"] = time.perf_counter() - start
    print(f"built in {phases_s['build']:.1f} s", flush=True)
    start = time.perf_counter()
    factory.get_lib().export_library(request["library"])
    graph = factory.get_graph_json()
    Path(request["graph"]).write_text(graph)
    weights = _save_weights(scratch / "weights", factory.get_params())
    phases_s["export"] = time.perf_counter() - start
    return {
        "phases_s": phases_s,
        "weights": weights,
        "kernels": _kernels_of(graph),
        "trials": trials,
        "versions": {"tvm": tvm.__version__, "bitblas": importlib.metadata.version("bitblas")},
    }


class Executor:
    """Runs Relay's graph executor; library and graph are files, weights the arrays by name.

    kind: the kind of device that the library is for, `llvm` or `cuda`. logits: the last call's, float32 [B, T, V].
    """

    def __init__(self, library: Path, graph: Path, weights: dict[str, np.ndarray], kind: str = "llvm") -> None:
        import tvm
        from tvm.contrib import graph_executor

        self._device = {"llvm": tvm.cpu, "cuda": tvm.cuda}[kind]()
        self._module = graph_executor.create(graph.read_text(), tvm.runtime.load_module(str(library)), self._device)
        for name, array in weights.items():
            self._module.set_input(name, array)
        # The executor's own memory: a tensor given to `set_output_zero_copy` stays empty if a reshape comes last.
        self._output = self._module.get_output(0)
        self.logits = np.from_dlpack(self._output) if kind == "llvm" else self._output.numpy()

    def run(self, ids: np.ndarray) -> np.ndarray:
        """Compute logits float32 [B, T, V] of ids int64 [B, T]; the next call overwrites them."""
        self._module.set_input("ids", ids)
        self._module.run()
        if self._device.device_type != self._device.kDLCPU:
            self._output.copyto(self.logits)  # waits for the GPU
        return self.logits

    def seconds(self, count: int) -> list[float]:
        """Time `count` calls on the last ids, in seconds by the device's clock, after one that is not counted."""
        return list(self._module.module.time_evaluator("run", self._device, number=1, repeat=count)().results)


def start(request: dict) -> dict:
    """Make an executor ready: `library`, `graph`, `weights` (a file), `table` (as `build` answers it), `kind` (of its
    device), `memory`.

    memory: the number of an open file that holds the logits, float32, at 0 and ids, int64 of `ids_shape`, at `ids_at`.
    Answers `logits_shape`: [B, T, V], or [B, 1, V] of a file with the last position alone.
    """
    global executor, shared
    weights = weights_of(Path(request["weights"]), request["table"])
    executor = Executor(Path(request["library"]), Path(request["graph"]), weights, request["kind"])
    file = f"/proc/self/fd/{request['memory']}"
    shared = (
        np.memmap(file, np.int64, "r", request["ids_at"], tuple(request["ids_shape"])),
        np.memmap(file, np.float32, "r+", 0, executor.logits.shape),
    )
    return {"logits_shape": list(executor.logits.shape)}


def run(request: dict) -> dict:
    """Run one forward pass of the executor that `start` made ready."""
    ids, logits = shared
    logits[...] = executor.run(ids)
    return {}


def weights_of(file: Path, table: list[dict]) -> dict[str, np.ndarray]:
    """Map the arrays in a file of weights, as views of it."""
    memory = np.memmap(file, np.uint8, "r")
    return {each["name"]: np.ndarray(each["shape"], each["dtype"], memory, each["offset"]) for each in table}


def _target_of(request: dict):
    """Make TVM's Target, after checking that its LLVM knows the CPU."""
    import tvm

    host = tvm.target.Target(request["host"] or request["target"])
    known = [str(name) for name in tvm.target.codegen.llvm_get_cpu_archlist(host)]
    if host.mcpu not in known:
        raise Refused(
            f"mcpu {str(host.mcpu)!r}: not known to LLVM {tvm.target.codegen.llvm_version_major()}, which compiles for "
            "Relay; leave --mcpu out for one that it knows"
        )
    if request["host"] is None:
        return host
    _compile_cuda_to_cubins()
    return tvm.target.Target(request["target"], host=host)


def _compile_cuda_to_cubins() -> None:
    """Have nvcc make machine code for the target's arch, where TVM asks for a fat binary, which hides it."""
    import tvm
    from tvm.contrib import nvcc

    def compile_cuda(code, target):
        return nvcc.compile_cuda(code, target_format="cubin")

    tvm.register_func("tvm_callback_cuda_compile", compile_cuda, override=True)


def _tune(module, params, target, level: int, tuning: dict):
    """Continue a search by MetaSchedule up to `trials` in all; return its database and the number that it holds."""
    import tvm
    import xgboost
    from tvm.meta_schedule.database import JSONDatabase
    from tvm.meta_schedule.relay_integration import extract_tasks, tune_relay

    xgboost.rabit = xgboost.collective  # its name until xgboost 2.0, by which TVM 0.17 asks for it
    folder = Path(tuning["folder"])
    database = JSONDatabase(*(str(folder / name) for name in DATABASE))
    left = tuning["trials"] - len(database)
    if left > 0:
        tuned_for = tvm.target.Target({**target.export(), "num-cores": tuning["threads"]})
        tasks = extract_tasks(module, tuned_for, params, opt_level=level)
        tune_relay(
            module,
            params,
            tuned_for,
            work_dir=str(folder),
            max_trials_global=left,
            num_trials_per_iter=max(1, min(BATCH, left // (2 * len(tasks)))),
            database=database,
            seed=1,
            num_tuning_cores=tuning["threads"],
            opt_level=level,
        )
        shutil.rmtree(folder / "logs", ignore_errors=True)
    return database, len(database)


def _kernels_of(graph: str) -> dict[str, int]:
    """Count a forward pass's calls of each kernel."""
    calls: dict[str, int] = {}
    for node in json.loads(graph)["nodes"]:
        if node["op"] == "tvm_op" and (name := node["attrs"]["func_name"]) != NO_KERNEL:
            calls[name] = calls.get(name, 0) + 1
    return calls


def _save_weights(path: Path, params: dict) -> list[dict]:
    """Write the arrays one after the other, and return the table of their offsets."""
    table = []
    with open(path, "wb") as file:
        for name, value in params.items():
            array = value.numpy()
            table.append({"name": name, "dtype": str(array.dtype), "shape": list(array.shape), "offset": file.tell()})
            file.write(np.ascontiguousarray(array).data)
    return table


def _die_with_parent() -> None:
    """Have the kernel kill this process if its parent dies without a word."""
    pr_set_pdeathsig = 1  # linux/prctl.h
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _reason_of(error: Exception) -> str:
    """Put an error in one line. TVM's begin with a stack of C++, and name the cause last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"


executor: Executor
shared: tuple[np.ndarray, np.ndarray]
ANSWERS = {"build": build, "start": start, "run": run}


def main() -> None:
    """Answer until the parent hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C, and ends this process
    _die_with_parent()
    with socket.socket(fileno=int(sys.argv[1])) as connection, connection.makefile("rw") as pipe:
        for line in pipe:
            request = json.loads(line)
            answer: dict[str, Any]
            try:
                answer = {"answer": ANSWERS[request.pop("ask")](request)}
            except Refused as error:
                answer = {"refused": str(error)}
            except Exception as error:
                traceback.print_exc()
                answer = {"failed": _reason_of(error)}
            sys.stdout.flush()
            pipe.write(json.dumps(answer) + "\n")
            pipe.flush()


if __name__ == "__main__":
    main()
