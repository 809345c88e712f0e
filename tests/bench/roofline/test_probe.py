"""The probes do the work that their rates are of, and measure it again without doing anything anew.

All is counted: by what the kernels compute, by what is compiled, and by a clock that tells no time.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import tvm

from bench.harness.worker import Worker
from bench.roofline import probe as probes
from bench.roofline.probe import FACTORY, KEPT, Kernel, Probe
from tvm_frontend.target import resolve_target

pytestmark = pytest.mark.slow

ONES = {"fp32": 0, "bf16": 0x3F803F80, "int8": 0x01010101, "int4": 0x01010101}  # packed int32 whose elements are all 1
Make = Callable[..., Probe]  # of a precision


@dataclass
class Ledger:
    """The books of a probe: what it compiled, the calls that it sampled, the sums of their outputs, and the rates."""

    compiled: list[tvm.runtime.Executable] = field(default_factory=list)
    outputs: list[tvm.runtime.Tensor] = field(default_factory=list)
    sums: list[float] = field(default_factory=list)
    sampled: list[Callable[[], object]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch) -> Ledger:
    """Have a probe in this process keep books; every call takes a second by its clock, so a rate is the call's work."""
    found, compile_module, rate = Ledger(), tvm.compile, Kernel.rate

    def compile_and_note(*arguments: object, **settings: object) -> dict[str, Callable[..., None]]:
        executable = compile_module(*arguments, **settings)
        found.compiled.append(executable)

        def kernel(data: tvm.runtime.Tensor, out: tvm.runtime.Tensor) -> None:
            executable["kernel"](data, out)
            found.outputs.append(out)

        return {"kernel": kernel}

    def sample(call: Callable[[], object], _: float) -> list[float]:
        call()
        found.sampled.append(call)
        found.sums.append(float(found.outputs[-1].numpy().sum(dtype=np.float64)))
        return [1.0]

    def rate_and_note(kernel: Kernel) -> float:
        found.rates.append(rate(kernel))
        return found.rates[-1]

    monkeypatch.setattr(tvm, "compile", compile_and_note)
    monkeypatch.setattr(probes, "sample", sample)
    monkeypatch.setattr(Kernel, "rate", rate_and_note)
    return found


@pytest.fixture
def probe_of_ones(monkeypatch: pytest.MonkeyPatch) -> Make:
    """Make a probe of one thread whose kernels multiply, add and read ones: their outputs count what was done."""

    def make(precision: str = "fp32") -> Probe:
        monkeypatch.setattr(probes, "FILL", {"float32": 1.0, "int32": ONES[precision]})
        probe = Probe()
        probe.load(1)
        return probe

    return make


def test_the_probes_measure_something_in_their_worker() -> None:
    with Worker(FACTORY, threads=1) as worker:
        worker.call("load", 1)
        for method, argument in (("peak_flops_per_s", "fp32"), ("read_bytes_per_s", 100_000)):
            assert 0 < worker.call(method, argument) < math.inf


@pytest.mark.parametrize("precision", [*ONES])
def test_each_multiply_add_that_counts_is_done(ledger: Ledger, probe_of_ones: Make, precision: str) -> None:
    """A product of ones adds 1 to a lane's sum, and counts as two operations."""
    probe_of_ones(precision).peak_flops_per_s(precision)
    assert ledger.rates == [2 * total for total in ledger.sums]
    assert len(ledger.rates) >= KEPT


@pytest.mark.parametrize("size", [100_000, 1_000_000])
def test_each_byte_that_counts_is_read(ledger: Ledger, probe_of_ones: Make, size: int) -> None:
    """A float32 of 1 adds 1 to a lane's sum in each pass, so a pass that the compiler left out would be missing."""
    probe_of_ones().read_bytes_per_s(size)
    assert ledger.rates == [4 * total for total in ledger.sums]
    assert ledger.rates[0] == pytest.approx(probes.BYTES_A_CALL, rel=0.01)


def test_the_peak_is_that_of_a_vector_unit(ledger: Ledger, probe_of_ones: Make) -> None:
    """Scalar multiply-adds would be a fraction of what the machine can do."""
    if resolve_target().vector_bits < 256:
        pytest.skip("a CPU without AVX2 has no fused multiply-add of 256 bits or more")
    probe_of_ones().peak_flops_per_s("fp32")
    assemblies = [executable.mod.inspect_source("asm") for executable in ledger.compiled]
    wide = [bool(re.search(r"vfmadd\d+ps\s.*%[yz]mm", assembly)) for assembly in assemblies]
    assert sum(wide) == sum(width >= 8 for width in probes.WIDTHS) * len(probes.ACCUMULATORS)


def test_narrow_products_are_no_slower(ledger: Ledger, probe_of_ones: Make) -> None:
    """They may be done as float32, so all of its kernels are tried too; a word of four products is four times one."""
    wide = probe_of_ones().peak_flops_per_s("fp32")
    for precision, words in (("bf16", 2), ("int8", 4), ("int4", 4)):
        assert wide <= probe_of_ones(precision).peak_flops_per_s(precision) <= words * wide


def test_asked_again_it_measures_the_fastest_kernels_and_compiles_none(ledger: Ledger, probe_of_ones: Make) -> None:
    probe = probe_of_ones("int8")
    first = probe.peak_flops_per_s("int8")
    kernels, tried, best = len(ledger.compiled), [*ledger.sampled], sorted(ledger.rates)[-KEPT:]
    assert len(tried) == kernels > KEPT
    assert probe.peak_flops_per_s("int8") == first
    assert len(ledger.compiled) == kernels
    assert sorted(ledger.rates[kernels:]) == best
    assert all(call in tried for call in ledger.sampled)


def test_asked_again_it_reads_the_same_memory_whatever_else_was_read(ledger: Ledger, probe_of_ones: Make) -> None:
    probe = probe_of_ones()
    first = probe.read_bytes_per_s(100_000)
    probe.read_bytes_per_s(1_000_000)
    assert probe.read_bytes_per_s(100_000) == first
    assert len(ledger.compiled) == 2
    assert ledger.sampled[2] is ledger.sampled[0]
