"""Engines in fewer bits: made from the exports, held to the reference by the tolerance of their precision."""

from collections.abc import Callable
from pathlib import Path

import pytest

from bench.backends import Contender, find_contenders
from bench.correctness.agreement import PRECISIONS, tolerance_of
from bench.correctness.reference import Truth
from bench.harness.runner import Runner
from bench.harness.work import PHASES
from bench.harness.worker import Worker
from bench.models.artifacts import Artifacts
from bench.models.build import MAKINGS, CannotMake, prepare
from gpt.config import GPTConfig
from gpt.files import sha256_file

pytestmark = pytest.mark.slow

# What is eager but for one thing need not prove the same again, and torch.compile takes its time.
LOW = [
    each
    for each in find_contenders((), [name for name in PRECISIONS if name != "fp32"])
    if not each.absent and each.engine not in ("sdpa", "inductor")
]


@pytest.fixture(scope="module")
def artifacts(copy_tiny: Callable[[Path], Artifacts], tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """Where the engines' files are made, each once, beside those in float32."""
    return copy_tiny(tmp_path_factory.mktemp("quantised"))


@pytest.mark.parametrize("contender", LOW, ids=lambda contender: contender.label)
def test_an_engine_agrees_in_every_phase(contender: Contender, artifacts: Artifacts) -> None:
    # tests/tvm_frontend holds a forward to the reference at each precision, and to compile one takes its time.
    phases = [phase for phase in contender.phases if (contender.engine, phase) != ("tvm", "prefill")]
    try:
        config = prepare(artifacts, [contender], phases)
    except CannotMake as error:
        pytest.skip(str(error))
    for file in {file for phase, file in contender.files if phase in phases}:
        if file in MAKINGS:
            source = artifacts.folder / MAKINGS[file].source
            assert MAKINGS[file].origin(artifacts.folder / file) == sha256_file(source)
    with Worker(contender.factory, threads=1) as worker, Truth(artifacts, config, 1) as truth:
        runner = Runner(contender, worker)
        runner.load(artifacts, config, 1)
        if runner.failed and "compute type" in runner.failed:
            pytest.skip(runner.failed)  # CTranslate2 has bfloat16 on some CPUs only
        assert runner.failed is None
        for phase in phases:
            for work in PHASES[phase].timed(config):
                runner.check(work, work.ids(config, 0), truth, config, timed=True)
                assert runner.errors == {}
                assert runner.checks[work].agrees, runner.checks[work]
        errors = [check.max_rel_err for check in runner.checks.values()]
        assert max(errors) > 1e-4  # it is not float32
        assert max(errors) > tolerance_of(contender.precision, config) / 40  # nor is the tolerance far away


def test_fewer_bits_have_a_tolerance_of_their_own() -> None:
    fp32, *fewer = [tolerance_of(precision, GPTConfig()) for precision in ("fp32", "bf16", "int8", "int4")]
    assert len(set(fewer)) == 3
    assert 1000 * fp32 < min(fewer)  # what rounds inputs is told from what does not
    assert max(fewer) == fewer[-1] < 1
