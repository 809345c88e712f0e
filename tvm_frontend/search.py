"""The search for schedules of kernels that have no hand schedule: MetaSchedule times candidates on this machine.

`tvm_frontend.tune` is its command. Candidates are built and timed in this process: MetaSchedule's own pools start new
processes for each batch, and each imports TVM for longer than it then takes to build a candidate.
"""

import json
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tqdm import tqdm
from tvm.ir.utils import derived_object
from tvm.relax.transform import MetaScheduleApplyDatabase
from tvm.s_tir import meta_schedule
from tvm.s_tir.meta_schedule.arg_info import ArgInfo
from tvm.s_tir.meta_schedule.builder import BuilderResult, PyBuilder
from tvm.s_tir.meta_schedule.builder.local_builder import default_build
from tvm.s_tir.meta_schedule.database import JSONDatabase, MemoryDatabase, TuningRecord
from tvm.s_tir.meta_schedule.measure_callback import PyMeasureCallback, UpdateCostModel
from tvm.s_tir.meta_schedule.relax_integration import extract_tasks
from tvm.s_tir.meta_schedule.runner import PyRunner
from tvm.s_tir.meta_schedule.runner.local_runner import LocalRunnerFuture
from tvm.s_tir.meta_schedule.search_strategy import EvolutionarySearch

from gpt.cli import UserError, defer_interrupt
from gpt.files import atomic_output, cut_half_line, is_leftover
from gpt.progress import progress_bar
from tvm_frontend.frontends import Source
from tvm_frontend.graph import Graph
from tvm_frontend.runtime.threads import chosen_threads, use_threads
from tvm_frontend.target import CompileTarget, check_runs_here
from tvm_frontend.tvm_patches import import_tensor_intrinsics

WORKLOADS, RECORDS, SUMMARY = "workloads.json", "records.json", "search.json"
BATCH = 64  # candidates between two updates of the cost model, MetaSchedule's own number; fewer where tasks are many
POPULATION = 8  # schedules that evolve for each one that is timed, MetaSchedule's own ratio
MEASURE_MS = 50  # the time that calls of one candidate are repeated for
SEED = 1


@dataclass
class Search:
    """Searches for the schedules of one model's kernels; `compile_model` runs it between its own phases.

    shape: [B, T]. trials: candidates to time in all, with those that were timed before. ops: parts of the kernels'
    names, to search for those alone; empty for all. threads: the number that kernels run on. folder: keeps what is
    found. seconds: the time spent so far, earlier runs included. found: the candidates timed so far. Raises UserError.
    """

    shape: tuple[int, int]
    trials: int
    ops: tuple[str, ...] = ()
    threads: int = field(default_factory=chosen_threads)
    folder: Path | None = None
    seconds: float = 0.0
    found: int = 0

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise UserError(f"trials={self.trials}: must be at least 1")
        if self.shape[0] < 1:
            raise UserError(f"batch={self.shape[0]}: must be at least 1")
        if find_spec("xgboost") is None:
            raise UserError("a search needs xgboost, which learns what is fast: pip install xgboost-cpu")

    @property
    def name(self) -> str:
        """Give the search's word in the compiled model's name."""
        return f"tuned-{'x'.join(map(str, self.shape))}"

    def check(self, source: Source, target: CompileTarget) -> None:
        """Raise UserError for a model that has no such shape, and a target that cannot be timed here."""
        if source.form != "forward" or source.config is None:
            raise UserError(
                f"a model of form {source.form}: a search takes the plain forward pass of an export of this project, "
                "as it fixes B and T"
            )
        T, block_size = self.shape[1], source.config.block_size
        if not 1 <= T <= block_size:
            raise UserError(f"tokens={T}: must be in 1 … {block_size}, the model's block_size")
        check_runs_here(target.to_json())

    def keep_in(self, folder: Path) -> None:
        """Keep what is found there, beside what earlier runs found. Raises UserError if it holds something else."""
        if folder.exists() and not (
            folder.is_dir()
            and {file.name for file in folder.iterdir() if not is_leftover(file)} <= {WORKLOADS, RECORDS, SUMMARY}
        ):
            raise UserError(f"{folder}: exists and is of no search, so it is left alone; choose another place with -o")
        self.folder = folder

    def to_json(self) -> dict[str, Any]:
        """Describe the search as the compiled model records it."""
        return {"trials": self.found, "seconds": round(self.seconds, 1), "database": str(self.folder)}

    def __call__(self, graph: Graph, target: CompileTarget) -> Graph:
        """Time candidates for the kernels that have no schedule, and give each the best of its own."""
        tvm_target = tvm.target.Target({**target.to_tvm().export(), "num-cores": self.threads})
        folder = self._folder()
        tasks = self._tasks(graph, tvm_target)
        folder.mkdir(parents=True, exist_ok=True)
        self._check_summary(target)
        database = self._database()
        workloads = [database.commit_workload(task.dispatched[0]) for task in tasks]
        self.found = sum(record.workload in workloads for record in database.get_all_tuning_records())
        if self.found < self.trials:
            start, before = time.perf_counter(), self.seconds
            try:
                self._search(tasks, tvm_target, database)
            finally:
                self.seconds = before + time.perf_counter() - start
                with atomic_output(folder / SUMMARY) as part:
                    part.write_text(json.dumps({"target": target.to_json(), "seconds": self.seconds}))
                print(f"{folder}: {self.found} trials are kept", file=sys.stderr)
        chosen = MemoryDatabase()
        for workload in workloads:
            best_first = database.get_top_k(workload, self.trials)
            chosen.commit_workload(workload.mod)
            if record := next((each for each in best_first if _computes_the_same(each, tvm_target)), None):
                chosen.commit_tuning_record(record)
        with tvm_target, chosen:
            return Graph(MetaScheduleApplyDatabase()(graph.module), graph.weights)

    def _search(self, tasks: list, target: tvm.target.Target, database: JSONDatabase) -> None:
        logging.getLogger(meta_schedule.__name__).setLevel(logging.CRITICAL)  # it prints tables, and fills log files
        import_tensor_intrinsics()
        left = self.trials - self.found
        batch = max(1, min(BATCH, left // (2 * len(tasks))))
        strategy = EvolutionarySearch(population_size=POPULATION * batch, init_min_unmeasured=batch)
        contexts = [
            meta_schedule.TuneContext(
                task.dispatched[0],
                target=target,
                space_generator="post-order-apply",
                search_strategy=strategy,
                task_name=task.task_name,
                rand_state=SEED + number,
                num_threads=self.threads,
            ).clone()
            for number, task in enumerate(tasks)
        ]
        with progress_bar(total=self.trials, initial=self.found, desc="search", unit="trial", leave=False) as bar:
            workloads = [database.commit_workload(task.dispatched[0]) for task in tasks]
            with defer_interrupt() as interrupted:
                here = _Here(self, bar, interrupted)
                meta_schedule.tune_tasks(
                    tasks=contexts,
                    task_weights=[float(task.weight) for task in tasks],
                    work_dir="",  # unused: this is where it would make a database of its own
                    max_trials_global=left,
                    num_trials_per_iter=batch,
                    builder=_Builder(here),
                    runner=_Runner(here),
                    database=database,
                    cost_model=meta_schedule.cost_model.XGBModel(num_tuning_cores=self.threads),
                    measure_callbacks=[_Keep(here, database, workloads), UpdateCostModel()],
                )
            if interrupted():
                raise KeyboardInterrupt

    def _tasks(self, graph: Graph, target: tvm.target.Target) -> list:
        """List the kernels to search for, the longest first. Raises UserError if there is none."""
        found = [task for task in extract_tasks(graph.module, target) if not _has_schedule(task.dispatched[0])]
        names = ", ".join(sorted(task.task_name for task in found))
        if not found:
            raise UserError("nothing to search for: every kernel has a hand schedule; --opt-level 0 searches for all")
        for op in self.ops:
            if op not in names:
                raise UserError(f"op {op!r}: in no kernel's name; there are {names}")
        asked = [task for task in found if not self.ops or any(op in task.task_name for op in self.ops)]
        return sorted(asked, key=lambda task: -_flops(task))

    def _folder(self) -> Path:
        """Give the folder that keeps what is found. Raises UserError if none was given."""
        if self.folder is None:
            raise UserError("a search keeps what it finds in a folder, and has none: give one to keep_in")
        return self.folder

    def _database(self) -> JSONDatabase:
        folder = self._folder()
        for name in (WORKLOADS, RECORDS):
            cut_half_line(folder / name)  # a search that was killed left it, and all before it is good
        try:
            return JSONDatabase(str(folder / WORKLOADS), str(folder / RECORDS))
        except Exception as error:  # TVM raises many types
            raise UserError(f"{folder}: damaged, TVM cannot read it; remove it to begin again") from error

    def _check_summary(self, target: CompileTarget) -> None:
        """Take up the seconds of earlier runs. Raises UserError if they were for another target, or are damaged."""
        folder = self._folder()
        path = folder / SUMMARY
        if not path.exists():
            return
        try:
            summary = json.loads(path.read_text())
            self.seconds, before = float(summary["seconds"]), CompileTarget.from_json(summary["target"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: damaged; remove {folder} to begin again") from error
        if before != target:
            raise UserError(
                f"{folder}: a search for the CPU {before.mcpu}, and this one is for {target.mcpu}, with other "
                "instructions; choose another place with -o"
            )


@dataclass
class _Here:
    """The state that builder, runner and keeper of results share. stopped: says if Ctrl-C came, which drops a batch.

    Without it Ctrl-C could arrive where TVM, calling Python from C++, takes any exception for a candidate's failure.
    """

    search: Search
    bar: tqdm
    stopped: Callable[[], bool]
    built: list = field(default_factory=list)

    def attempt(self, work) -> tuple[Any, str | None]:
        """Return the result of `work()`, or its error in words; after Ctrl-C do nothing."""
        if self.stopped():
            return None, "stopped"
        try:
            return work(), None
        except Exception as error:  # a candidate that cannot be built or run is just not taken
            return None, str(error)


@derived_object
class _Builder(PyBuilder):
    def __init__(self, here: _Here) -> None:
        super().__init__()
        self.here = here

    def build(self, build_inputs: list) -> list[BuilderResult]:
        """Build the candidates to machine code in memory, which the runner finds by its number."""
        results = []
        self.here.built.clear()
        for number, each in enumerate(build_inputs):
            built, error = self.here.attempt(lambda each=each: default_build(each.mod, each.target, None))
            self.here.built.append(built)
            results.append(BuilderResult(None if error else str(number), error))
        return results


@derived_object
class _Runner(PyRunner):
    def __init__(self, here: _Here) -> None:
        super().__init__()
        self.here = here

    def run(self, runner_inputs: list) -> list[LocalRunnerFuture]:
        """Time the candidates, in seconds a call."""
        use_threads(self.here.search.threads)
        return [LocalRunnerFuture(*self.here.attempt(lambda each=each: self._time(each))) for each in runner_inputs]

    def _time(self, each) -> list[float]:
        library = self.here.built[int(each.artifact_path)]
        arguments = [_argument(*info.as_json()) for info in each.args_info]
        evaluator = library.time_evaluator("main", tvm.cpu(), number=1, min_repeat_ms=MEASURE_MS)
        return [float(second) for second in evaluator(*arguments).results]


@derived_object
class _Keep(PyMeasureCallback):
    def __init__(self, here: _Here, database: JSONDatabase, workloads: list) -> None:
        super().__init__()
        self.here, self.database, self.workloads = here, database, workloads

    def apply(self, task_scheduler, task_id, measure_candidates, builder_results, runner_results) -> None:
        """Write each time to the disk; then Ctrl-C may end the search."""
        context = task_scheduler.tasks_[task_id].ctx
        workload = self.workloads[task_id]
        for candidate, result in zip(measure_candidates, runner_results, strict=True):
            if result.run_secs is not None:
                record = TuningRecord(
                    candidate.sch.trace, workload, result.run_secs, context.target, candidate.args_info
                )
                self.database.commit_tuning_record(record)
                self.here.search.found += 1
                self.here.bar.update()
        self.here.bar.set_postfix_str(context.task_name)
        if self.here.stopped():
            raise KeyboardInterrupt


def _argument(_, dtype: str, shape: list[int]) -> tvm.runtime.Tensor:
    """Make an argument for a kernel: random floats, and zeros for integers, which may be indices."""
    random = np.random.default_rng(0)
    shape = [int(size) for size in shape]
    array = random.random(shape, np.float32) if dtype.startswith("float") else np.zeros(shape)
    return tvm.runtime.tensor(array.astype(dtype))


def _computes_the_same(record: TuningRecord, target: tvm.target.Target) -> bool:
    """Compare a schedule's result with that of the kernel without one: some of MetaSchedule's are wrong."""
    schedule = tvm.s_tir.Schedule(record.workload.mod)
    record.trace.apply_to_schedule(schedule, remove_postproc=False)
    results, inputs = [], ArgInfo.from_entry_func(record.workload.mod, remove_preproc=False)
    for module in (record.workload.mod, schedule.mod):
        arguments = [_argument(*info.as_json()) for info in inputs]
        tvm.compile(module, target)["main"](*arguments)
        results.append([argument.numpy() for argument in arguments])
    return all(np.allclose(left, right, rtol=1e-3, atol=1e-4) for left, right in zip(*results, strict=True))


def _has_schedule(module: tvm.IRModule) -> bool:
    return any(function.attrs.get("tirx.is_scheduled", False) for _, function in module.functions_items())


def _flops(task) -> float:
    return float(task.weight) * tvm.s_tir.analysis.estimate_tir_flops(task.dispatched[0])
