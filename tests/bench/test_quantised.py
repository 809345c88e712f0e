"""Tests engines at lower precisions: their files are built from the exports, and they meet their tolerance."""

from collections.abc import Callable
from pathlib import Path

import pytest

from bench.backends import Candidate, find_candidates
from bench.correctness.agreement import PRECISIONS
from bench.correctness.reference import ReferenceModel
from bench.harness.runner import Runner
from bench.harness.work import PHASES
from bench.harness.worker import Worker
from bench.models.artifacts import Artifacts
from bench.models.build import BUILD_RULES, CannotMake, prepare
from gpt.files import sha256_file
from tvm_frontend.target import resolve_target

pytestmark = pytest.mark.slow

# Engines derived from eager are not tested again, and torch.compile is slow.
LOW = [
    each
    for each in find_candidates((), [name for name in PRECISIONS if name != "fp32"])
    if not each.absent and each.engine not in ("sdpa", "inductor")
]


VNNI = {"avx512vnni", "avxvnni"}  # instructions that add products of bytes in 32 bits


@pytest.fixture(scope="module")
def artifacts(copy_tiny: Callable[[Path], Artifacts], tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """Provide a folder in which the engines' files are built once, beside those in float32."""
    return copy_tiny(tmp_path_factory.mktemp("quantised"))


@pytest.mark.parametrize("candidate", LOW, ids=lambda candidate: candidate.label)
def test_an_engine_agrees_in_every_phase(candidate: Candidate, artifacts: Artifacts) -> None:
    if candidate.label in ("ctranslate2 int8", "onnxruntime int8") and not VNNI & resolve_target().features:
        pytest.skip("without VNNI the sums of its int8 products saturate at 16 bits: the bench says that it disagrees")
    # tests/tvm_frontend compares the forward pass with the reference at each precision; compiling it is slow.
    phases = [phase for phase in candidate.phases if (candidate.engine, phase) != ("tvm", "prefill")]
    try:
        config = prepare(artifacts, [candidate], phases)
    except CannotMake as error:
        pytest.skip(str(error))
    for file in {file for phase, file in candidate.files if phase in phases}:
        if file in BUILD_RULES:
            source = artifacts.folder / BUILD_RULES[file].source
            assert BUILD_RULES[file].origin(artifacts.folder / file) == sha256_file(source)
    with Worker(candidate.factory, threads=1) as worker, ReferenceModel(artifacts, config, 1) as reference:
        runner = Runner(candidate, worker)
        runner.load(artifacts, config, 1)
        if runner.failed and ("compute type" in runner.failed or "no bfloat16 on this CPU" in runner.failed):
            pytest.skip(runner.failed)  # CTranslate2 and OpenVINO have bfloat16 on some CPUs only
        assert runner.failed is None
        for phase in phases:
            for work in PHASES[phase].timed(config):
                runner.check(work, work.ids(config, 0), reference, timed=True)
                assert runner.errors == {}
                assert runner.checks[work].agrees, runner.checks[work]
        errors = [check.max_rel_err for check in runner.checks.values()]
        assert max(errors) > 1e-4  # the precision is really lower than float32
