"""Peers in fewer bits: made from the exports, held to the reference by the tolerance of their precision."""

from pathlib import Path

import pytest

from bench.agreement import tolerance_of
from bench.backends import find_contenders
from bench.phases import PHASES
from bench.prepare import MAKINGS, choose_artifacts, prepare
from bench.reference import Truth
from bench.runner import Runner
from bench.worker import Worker
from gpt.config import GPTConfig
from gpt.files import sha256_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the engines' files are made, each once."""
    return tmp_path_factory.mktemp("quantised")


@pytest.mark.parametrize("engine", ["onnxruntime_int8", "openvino_int8", "openvino_int4"])
def test_an_engine_agrees_in_every_phase(engine: str, folder: Path) -> None:
    if engine.startswith("openvino"):
        pytest.importorskip("nncf")
    artifacts, _ = choose_artifacts(folder, "tiny")
    [contender] = find_contenders([engine])
    config = prepare(artifacts, [contender])
    for _, file in contender.files:
        assert MAKINGS[file].origin(artifacts.folder / file) == sha256_file(artifacts.folder / MAKINGS[file].source)
    with Worker(contender.factory, threads=1) as worker, Truth(artifacts, config, 1) as truth:
        runner = Runner(contender, worker)
        runner.load(artifacts, config, 1)
        assert runner.failed is None
        for phase in contender.phases:
            for work in PHASES[phase].timed(config):
                runner.check(work, work.ids(config, 0), truth, config, timed=True)
                assert runner.errors == {}
                assert runner.checks[work].agrees, runner.checks[work]
        assert max(check.max_rel_err for check in runner.checks.values()) > 1e-4  # it is not float32


def test_fewer_bits_have_a_tolerance_of_their_own() -> None:
    config = GPTConfig()
    assert tolerance_of("float32", config) < tolerance_of("int8", config) < tolerance_of("int4", config) < 1
