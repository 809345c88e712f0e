"""Options and fixtures of `pytest bench/ --benchmark-only`: the model, the engines, the works, a worker per engine.

A benchmark of a phase is a test with the fixtures `benchmark`, `work` and `race`, in a module with `PHASE`, the phase's
name: it is run for each engine that has the phase and each piece of work of it.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.backends import Candidate, find_candidates
from bench.correctness.agreement import PRECISIONS
from bench.correctness.reference import ReferenceModel
from bench.harness.machine import checked_threads, describe_machine
from bench.harness.plan import Plan, works_of
from bench.harness.runner import Runner
from bench.harness.work import PHASES, Work
from bench.harness.worker import Worker
from bench.models.artifacts import Artifacts
from bench.models.build import choose_artifacts, config_of, prepare
from bench.models.shape import Model
from gpt.cli import UserError
from gpt.version import PROJECT, project_version

SETUP = pytest.StashKey["Setup"]()
SEED = 0  # of the random ids; python -m bench draws a fresh one
SECONDS = 1.0  # of timing, about, for each engine at each work


@dataclass(frozen=True)
class Setup:
    """The comparison of one session of pytest. words: a description of the model."""

    artifacts: Artifacts
    words: str
    config: Model
    candidates: list[Candidate]
    plan: Plan


class WorkerClock:
    """A timer for pytest-benchmark that shows the samples of a worker's own clock."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def __call__(self) -> float:
        return self._seconds

    def advance(self, samples_s: Iterator[float]) -> None:
        """Let the next sample pass."""
        self._seconds += next(samples_s)


CLOCK = WorkerClock()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that choose the model, the engines and the works."""
    group = parser.getgroup("engines")
    group.addoption("--engine", action="append", default=[], metavar="NAME", help="only this engine; repeatable")
    group.addoption("--artifacts", type=Path, default=Path("artifacts"), help="the folder of the model")
    group.addoption("--seeded", metavar="NAME", help="a model with random weights instead: demo, gpt2 or bigram")
    group.addoption("--precision", default="fp32", choices=[*PRECISIONS], help="number format of the engines' products")
    group.addoption("--shape", action="append", default=[], metavar="BxT", help="prefill this shape; repeatable")
    group.addoption("--context", action="append", default=[], type=int, help="decode behind so many tokens; repeatable")
    group.addoption("--threads", type=int, help="threads of every engine; by default the physical cores")


def pytest_report_header(config: pytest.Config) -> str:
    """Name the model and the threads at the head of the report."""
    setup = _setup_of(config)
    return f"engines run on {setup.words}, {setup.plan.threads} threads each"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a benchmark for each work of its phase and each engine that has it."""
    if "race" not in metafunc.fixturenames:
        return
    setup, phase = _setup_of(metafunc.config), metafunc.module.PHASE
    works = [work for work in setup.plan.works if work.phase == phase]
    metafunc.parametrize("work", works, ids=[work.name.replace(" ", "-") for work in works], scope="session")
    able = [candidate for candidate in setup.candidates if phase in candidate.phases]
    labels = [candidate.label.replace(" ", "-") for candidate in able]
    metafunc.parametrize("runner", able, ids=labels, indirect=True, scope="session")


@pytest.fixture(scope="session")
def setup(pytestconfig: pytest.Config) -> Setup:
    """Return the comparison of this session."""
    return _setup_of(pytestconfig)


@pytest.fixture(scope="session")
def start(setup: Setup) -> Iterator[Callable[[Candidate], Runner]]:
    """Start a candidate's runner, loaded and with all of its files, once; all end with the session."""
    with ExitStack() as stack:

        @cache
        def started(candidate: Candidate) -> Runner:
            prepare(setup.artifacts, [candidate], setup.plan.phases, setup.plan.prompts)
            worker = Worker(candidate.factory, setup.plan.threads, candidate.interpreter)
            runner = Runner(candidate, stack.enter_context(worker), setup.plan.works)
            runner.load(setup.artifacts, setup.config, setup.plan.threads)
            return runner

        yield started


@pytest.fixture(scope="session")
def runner(request: pytest.FixtureRequest, start: Callable[[Candidate], Runner]) -> Runner:
    """Return one engine, loaded; skip it if it is absent."""
    if reason := request.param.absent:
        pytest.skip(f"{request.param.engine}: {reason}")
    return start(request.param)


@pytest.fixture(scope="session")
def reference(setup: Setup) -> Iterator[ReferenceModel]:
    """Start the reference model."""
    prepare(setup.artifacts, [])
    with ReferenceModel(setup.artifacts, setup.config, setup.plan.threads, seed=setup.plan.seed) as found:
        yield found


@pytest.fixture
def race(
    benchmark: BenchmarkFixture, runner: Runner, work: Work, setup: Setup, reference: ReferenceModel
) -> Callable[[], None]:
    """Check an engine at its work and at those that are always checked of the phase; then time its calls."""

    def run() -> None:
        for each in (*PHASES[work.phase].checked(setup.config), work):
            if each not in runner.checks and runner.may_run(each):
                ids = each.ids(setup.config, setup.plan.seed)
                runner.check(each, ids, reference, timed=each == work)
        benchmark.group = f"{work.phase} {work.name}, time of a {work.unit}"
        benchmark.extra_info.update(_description(runner, work, setup))
        assert not runner.failed, runner.failed
        assert not runner.errors, runner.errors
        assert not runner.disagreed, runner.disagreed
        runner.take_turn(work, work.ids(setup.config, setup.plan.seed), SECONDS, SECONDS)
        assert not runner.errors, runner.errors
        if work in runner.left_out:  # a call takes too long, as on a machine whose cores are all busy
            pytest.skip(runner.left_out[work])
        measured = runner.measurement_at(work)
        assert measured is not None, f"{runner.candidate.label} was not timed at {work.phase} {work.name}"
        samples_s = measured.samples_s[-1]
        benchmark.pedantic(CLOCK.advance, (iter(samples_s),), rounds=len(samples_s))

    return run


def _description(runner: Runner, work: Work, setup: Setup) -> dict:
    """Describe the engine, the work and the machine for the results of pytest-benchmark."""
    each, agreement = runner.candidate, runner.checks.get(work)
    return {
        "engine": each.engine,
        "variant": each.variant,
        "phase": work.phase,
        "work": work.name,
        "unit": work.unit,
        "precision": each.precision,
        "dtype": PRECISIONS[each.precision].dtype,
        "B": work.B,
        "T": work.T,
        "context": work.context,
        "moved_bytes": work.moved_bytes(setup.config, each.precision),
        "threads": setup.plan.threads,
        "model": {"words": setup.words, "config": asdict(setup.config)},
        "versions": {PROJECT: project_version(), **runner.versions},
        "machine": describe_machine(),
        "seed": setup.plan.seed,
        "agreement": asdict(agreement) if agreement else None,
        "checked_at": [f"{checked.phase} {checked.name}" for checked in runner.checks],
    }


def _setup_of(config: pytest.Config) -> Setup:
    """Read the comparison from the command line, once. Raises UsageError for a user's mistake."""
    if SETUP not in config.stash:
        precision = config.getoption("precision")
        try:
            candidates = find_candidates(config.getoption("engine"), [precision])
            artifacts, words = choose_artifacts(config.getoption("artifacts"), config.getoption("seeded"))
            model = config_of(artifacts)
            works = works_of(model, (), config.getoption("shape"), config.getoption("context"))
            plan = Plan(model, works, checked_threads(config.getoption("threads")), seed=SEED, precision=precision)
        except UserError as error:
            raise pytest.UsageError(str(error)) from error
        config.stash[SETUP] = Setup(artifacts, words, model, candidates, plan)
    return config.stash[SETUP]
