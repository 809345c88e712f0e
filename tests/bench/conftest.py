"""Fixtures that the tests of `bench` share."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.backends import find_candidates
from bench.correctness.agreement import PRECISIONS
from bench.models.artifacts import Artifacts
from bench.models.build import SEEDED, choose_artifacts, prepare
from gpt.config import GPTConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config() -> GPTConfig:
    """Return the shape of the seeded model for tests."""
    return SEEDED["tiny"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """Provide the seeded model in every form that an engine needs. Tests must not write to it."""
    artifacts, _ = choose_artifacts(tmp_path_factory.mktemp("tiny"), "tiny")
    prepare(artifacts, find_candidates())
    return artifacts


@pytest.fixture(scope="session")
def copy_tiny(tiny: Artifacts) -> Callable[[Path], Artifacts]:
    """Copy the files to a folder in which a test may change them and build more."""

    def copy(folder: Path) -> Artifacts:
        for path in tiny.folder.rglob("*"):
            if path.is_file():
                to = folder / tiny.folder.name / path.relative_to(tiny.folder)
                to.parent.mkdir(parents=True, exist_ok=True)
                os.link(path, to)
        return Artifacts(folder / tiny.folder.name)

    return copy


@pytest.fixture
def python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Run `python -m` with some arguments in an empty folder."""
    ours = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")
    }  # the environment of this pytest is left out

    def run(*arguments: object) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", *map(str, arguments)],
            cwd=tmp_path,
            env=ours | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


@pytest.fixture
def results() -> dict:
    """Provide a comparison of five engines: one wins, one has two variants, one is absent, one failed.

    It has prefill at two shapes, decode at one context without O0, and generate by two engines.
    """
    rows = []
    for T, limit_ms in ((16, 0.5), (64, 1.0)):
        scale = T / 16
        rows += [
            _row("eager", "", T, limit_ms, [4 * scale, 4.1 * scale, 3.9 * scale]),
            _row("fast", "O0", T, limit_ms, [100 * scale, 101 * scale, 102 * scale]),
            _row("fast", "O3", T, limit_ms, [1 * scale, 1.01 * scale, 1.02 * scale]),
            _row("gone", "", T, limit_ms, [], status="absent", reason="not installed: pip install gone"),
            _row("broken", "", T, limit_ms, [], status="failed", reason="RuntimeError: <script>alert(1)</script>"),
        ]
    decode = {"phase": "decode", "work": "context 15", "context": 15, "unit": "token", "limit_binds": "reading"}
    rows += [
        _row("eager", "", 1, 0.1, [0.8, 0.81, 0.79], **decode),
        _row("fast", "O3", 1, 0.1, [0.2, 0.21, 0.22], moved_bytes=2_100_000, **decode),
        _row("gone", "", 1, 0.1, [], status="absent", reason="not installed: pip install gone", **decode),
    ]
    generate = decode | {"phase": "generate", "work": "8 tokens after 8", "context": 8, "moved_bytes": None}
    rows += [
        _row("eager", "", 8, 0.1, [0.9, 1.0, 1.1], **generate),
        _row("fast", "O3", 8, 0.1, [0.25, 0.25, 0.25], max_abs_err=0.0, max_rel_err=0.0, **generate),
    ]
    return {
        "machine": {
            "cpu": "Test CPU",
            "architecture": "x86_64",
            "physical_cores": 2,
            "logical_cpus": 4,
            "memory_bytes": 2**34,
            "simd": "avx2",
            "system": "Linux 6",
            "python": "3.11.0",
        },
        "model": {
            "words": "the seeded model 'tiny'",
            "config": SEEDED["tiny"].__dict__,
            "about": "2 layers, 2 heads, 32 wide",
            "source": "Checkpoint",
            "sha256": "ab" * 32,
        },
        "phases": ["prefill", "decode", "generate"],
        "truth": "eager in float64",
        "measure": "PyTorch itself",
        "judges": {name: precision.judge for name, precision in PRECISIONS.items()},
        "text": "no trained model: no loss",
        "precisions": ["fp32"],
        "baselines": {"fp32": "eager"},
        "precision": "fp32",  # as `in_group` gives it
        "baseline": "eager",
        "rounds": 3,
        "threads": 2,
        "minutes": 1.0,
        "seed": 7,
        "created": "2030-01-01 00:00 UTC",
        "command": "python -m bench",
        "limits": {
            "fp32": {
                "threads": 2,
                "peak_flops_per_s": 4e11,
                "bandwidth_bytes_per_s": 2e11,
                "working_set_bytes": 100_000,
                "memory_bytes_per_s": 4e10,
                "precision": "fp32",
            },
        },
        "losses": [],
        "compiled": [
            {"group": "fp32", "label": "fast O3", "phase": "prefill", "work": "1×64", "import_s": 1.5, "build_s": 2.25}
            | {"library_bytes": 310_000, "weights_bytes": 2_100_000, "kernels": 9, "calls": 17},
        ],
        "checks": [
            {
                "group": "fp32",
                "label": "eager",
                "phase": "prefill",
                "work": "1×1",
                "agrees": None,
                "reason": "left out",
            },
            {
                "group": "fp32",
                "label": "fast O3",
                "phase": "prefill",
                "work": "1×16",
                "agrees": True,
                "reason": None,
                "max_rel_err": 1e-7,
            }
            | {"tolerance": 1e-5, "top1_match": 1.0, "share_of_allowed": 0.01},
        ],
        "rows": rows,
        "versions": {"torch": "2", "fast": "1"},
        "seconds": 12.0,
    }


def _row(engine: str, variant: str, T: int, limit_ms: float, samples_ms: list[float], **changes: object) -> dict:
    median_ms = sorted(samples_ms)[1] if samples_ms else None
    speedup = 4 * (T / 16 if T > 8 else 0.2) / median_ms if samples_ms else None
    return {
        "engine": engine,
        "variant": variant,
        "label": f"{engine} {variant}".strip(),
        "summary": f"the engine {engine}",
        "phase": "prefill",
        "work": f"1×{T}",
        "group": "fp32",
        "precision": "fp32",
        "dtype": "float32",
        "B": 1,
        "T": T,
        "context": 0,
        "unit": "prefill",
        "moved_bytes": 1_000_000,
        "threads": 2,
        "status": "timed",
        "reason": None,
        "samples_ms": samples_ms,
        "samples_by_round": [1] * len(samples_ms),
        "median_ms": median_ms,
        "spread": 0.05 if samples_ms else None,
        "speedup": {"median": speedup, "low": speedup, "high": speedup} if samples_ms else None,
        "limit_ms": limit_ms,
        "limit_binds": "arithmetic",
        "percent_of_limit": 100 * limit_ms / median_ms if samples_ms else None,
        "max_abs_err": 1e-6 if samples_ms else None,
        "max_rel_err": 2e-7 if samples_ms else None,
        "top1_match": 1.0 if samples_ms else None,
        "agrees": True if samples_ms else None,
        "share_of_allowed": 0.02 if samples_ms else None,
        "tolerance": 1e-5 if samples_ms else None,
    } | changes
