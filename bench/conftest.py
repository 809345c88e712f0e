"""`pytest bench/ --benchmark-only`: which model, which engines, which shapes, and one worker for each engine."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from bench import reference
from bench.agreement import random_ids
from bench.artifacts import Artifacts
from bench.backends import Contender, find_contenders
from bench.compare import Plan, default_shapes, parse_shape
from bench.machine import physical_cores
from bench.prepare import choose_artifacts, config_of, prepare
from bench.runner import CALL_DEADLINE_S, LOAD_DEADLINE_S, PHASE, Runner, Shape
from bench.worker import Worker
from gpt.cli import UserError
from gpt.config import GPTConfig

SETUP = pytest.StashKey["Setup"]()
SEED = 0  # of the random ids; python -m bench draws a fresh one


@dataclass(frozen=True)
class Setup:
    """What a session of pytest compares. words: whose model it is."""

    artifacts: Artifacts
    words: str
    config: GPTConfig
    contenders: list[Contender]
    plan: Plan


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("engines")
    group.addoption("--engine", action="append", default=[], metavar="NAME", help="only this engine; repeatable")
    group.addoption("--artifacts", type=Path, default=Path("artifacts"), help="the folder of the model")
    group.addoption("--seeded", metavar="NAME", help="a model with random weights instead: demo, gpt2 or bigram")
    group.addoption("--shape", action="append", default=[], metavar="BxT", help="time this shape; repeatable")
    group.addoption("--threads", type=int, help="of every engine; by default the physical cores")


def pytest_report_header(config: pytest.Config) -> str:
    setup = _setup_of(config)
    return f"engines run on {setup.words}, {setup.plan.threads} threads each"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    setup = _setup_of(metafunc.config)
    if "shape" in metafunc.fixturenames:
        names = [f"{B}x{T}" for B, T in setup.plan.shapes]
        metafunc.parametrize("shape", setup.plan.shapes, ids=names, scope="session")
    if "runner" in metafunc.fixturenames:
        labels = [contender.label.replace(" ", "-") for contender in setup.contenders]
        metafunc.parametrize("runner", setup.contenders, ids=labels, indirect=True, scope="session")


@pytest.fixture(scope="session")
def setup(pytestconfig: pytest.Config) -> Setup:
    """What this session compares, with all its files there."""
    found = _setup_of(pytestconfig)
    prepare(found.artifacts, found.contenders)
    return found


@pytest.fixture(scope="session")
def start(setup: Setup) -> Iterator[Callable[[Contender], Runner]]:
    """The loaded runner of a contender, started once; all are ended with the session."""
    with ExitStack() as stack:

        @cache
        def started(contender: Contender) -> Runner:
            runner = Runner(contender, stack.enter_context(Worker(contender.factory, setup.plan.threads)))
            runner.load(setup.artifacts, setup.plan.threads)
            return runner

        yield started


@pytest.fixture(scope="session")
def runner(request: pytest.FixtureRequest, start: Callable[[Contender], Runner]) -> Runner:
    """One engine, loaded; skips if a package of it is absent."""
    if reason := request.param.reason_missing:
        pytest.skip(f"{request.param.engine}: {reason}")
    return start(request.param)


@pytest.fixture(scope="session")
def expected(setup: Setup) -> Iterator[Callable[[Shape], tuple[np.ndarray, np.ndarray]]]:
    """Random ids int64 [B, T] of a shape and the reference's logits float64 [B, T, V] of them."""
    with Worker(reference.FACTORY, setup.plan.threads) as truth:
        truth.call("load", setup.artifacts, setup.plan.threads, "", deadline_s=LOAD_DEADLINE_S)

        def of_shape(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
            ids = random_ids(setup.config, *shape, setup.plan.seed)
            return ids, truth.call(PHASE, ids, deadline_s=CALL_DEADLINE_S)

        yield of_shape


def _setup_of(config: pytest.Config) -> Setup:
    """From the command line, once. Raises UsageError for what the user can mend."""
    if SETUP not in config.stash:
        try:
            contenders = find_contenders(config.getoption("engine"))
            artifacts, words = choose_artifacts(config.getoption("artifacts"), config.getoption("seeded"))
            model = config_of(artifacts)
            shapes = tuple(parse_shape(text, model) for text in config.getoption("shape")) or default_shapes(model)
            plan = Plan(shapes, config.getoption("threads") or physical_cores(), seed=SEED)
        except UserError as error:
            raise pytest.UsageError(str(error)) from error
        config.stash[SETUP] = Setup(artifacts, words, model, contenders, plan)
    return config.stash[SETUP]
