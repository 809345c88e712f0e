"""python -m bench.gpu.cases cuda       # on the GPU that is here; with cpu, in the emulator of a GPU's threads

The cases of every CUDA kernel: inputs, the reference in float64, and the error that rounding explains. Inputs are new
random numbers at each run; what a kernel forgets to write is NaN.
"""

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is one line too
    from gpt.cli import run_main

    run_main("bench.gpu.cases")

import importlib
import json
import math
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import ml_dtypes
import numpy as np
import tvm
import tvm_ffi
import tyro

from bench.gpu.emulator import EmulatedLauncher
from bench.harness.worker import MOST_CHARACTERS
from gpt.cli import UserError
from tvm_frontend.cuda_toolchain import cuda_machine_code, gpu_arch, load_cuda_runtime
from tvm_frontend.kernels.cuda import CudaKernels
from tvm_frontend.kernels.cuda.launch import Launcher, source
from tvm_frontend.passes.rewrite import with_root
from tvm_frontend.target import resolve_target

Device = Literal["cuda", "cpu"]
PLACES = {"cuda": "on_gpu", "cpu": "emulated"}  # the word for a device in the names of cases
ERROR = "error_of_tolerance"  # a case's largest error over what rounding explains
MODULE = "bench.gpu.cases"
NO_GPU = "no NVIDIA driver with a GPU on this machine"
DTYPES = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16, "tf32": np.float32}
HALF = ("bf16", "fp16")
UNIT_ROUNDOFF = {"bf16": 2.0**-8, "fp16": 2.0**-11, "tf32": 2.0**-11}
ACTIVATIONS = {
    None: lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}
TEXT_LENGTH = 9  # positions that sampled tokens are written to


class Executor(ABC):
    """Compiles a kernel made with `launcher` and runs it. folder: for the files of one kernel, made anew for each."""

    launcher: Launcher

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def build(self, kernel: tvm.tirx.PrimFunc) -> tuple[tvm.runtime.Device, Callable]:
        """Compile a kernel; return the device that it runs on, and the function of tensors on that device.

        Raises UserError if the device is absent.
        """

    def run_in_place(
        self,
        kernel: tvm.tirx.PrimFunc,
        arguments: Sequence[np.ndarray],
        written: Sequence[np.ndarray],
        *,
        shape: tuple[int, ...],
        dtype: str = "float32",
    ) -> list[np.ndarray]:
        """Run a kernel on `arguments`, then `written`, which it writes to, then its result of a shape and dtype.

        Returns the result in float64, and the arrays of `written` as they are afterwards.
        """
        device, function = self.build(kernel)
        unwritten = np.full(shape, np.nan, dtype)
        *inputs, out = (_to_tensor(each, device) for each in (*arguments, *written, unwritten))
        function(*inputs, out)
        return [_to_float64(out), *(tensor.numpy() for tensor in inputs[len(arguments) :])]

    def run(self, kernel: tvm.tirx.PrimFunc, *arguments: np.ndarray, **result: Any) -> np.ndarray:
        """Run a kernel that writes nothing but its result; see `run_in_place`."""
        return self.run_in_place(kernel, arguments, [], **result)[0]


class EmulatedExecutor(Executor):
    """Runs kernels in the emulator, on the CPU."""

    launcher: EmulatedLauncher

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.launcher = EmulatedLauncher()

    def build(self, kernel: tvm.tirx.PrimFunc) -> tuple[tvm.runtime.Device, Callable]:
        self.launcher.load(self.folder)
        return tvm.cpu(), tvm.compile(_module_of(kernel), resolve_target().to_tvm())["run"]


class GpuExecutor(Executor):
    """Runs kernels on this machine's first GPU."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.launcher = Launcher()

    def build(self, kernel: tvm.tirx.PrimFunc) -> tuple[tvm.runtime.Device, Callable]:
        arch, library = gpu_arch(), self.folder / "kernel.so"
        if arch is None:
            raise UserError(NO_GPU)
        with cuda_machine_code(arch, before=source()):
            tvm.compile(_module_of(kernel), resolve_target("cuda", arch=arch).to_tvm()).export_library(str(library))
        load_cuda_runtime()
        return tvm.cuda(), tvm_ffi.load_module(library)["run"]


EXECUTORS: dict[str, type[Executor]] = {"cuda": GpuExecutor, "cpu": EmulatedExecutor}


@dataclass(frozen=True)
class Case:
    """One kernel at one shape, to be compared with float64.

    test: the kernel family and the behaviour, as `linear::any_number_of_rows`. parameters: of this case among those of
    its test, empty if it is the only one. check: runs it on an executor; it returns the largest error over the
    tolerance, or None where results must be equal, and raises AssertionError where they are not.
    """

    test: str
    parameters: str
    check: Callable[[Executor], float | None]

    def __str__(self) -> str:
        return self.parameters or "only"

    def name_on(self, device: str) -> str:
        """The name in reports, as pytest spells it for the test that runs the same case."""
        family, _, behaviour = self.test.partition("::")
        parameters = "-".join(filter(None, (PLACES[device], self.parameters)))
        return f"test_{family}::test_{behaviour}[{parameters}]"


def share_of_tolerance(found: np.ndarray, expected: np.ndarray, tolerance: np.ndarray | float) -> float:
    """Return the largest error over the tolerance, which is one number or one for each element; NaN if one is NaN."""
    return float((np.abs(found - expected) / tolerance).max())


def check_linear(
    executor: Executor,
    precision: str,
    rows: tuple[int, int],
    K: int,
    N: int,
    *,
    activation: str | None = None,
    residual: bool = False,
    narrow: bool = False,
    multiprocessors: int | None = None,
) -> float:
    """Compare one linear layer of rows [B, T], whose reference has its inputs rounded as the kernel is given them."""
    kernels = CudaKernels(precision, executor.launcher)
    kernels.multiprocessors = multiprocessors or kernels.multiprocessors
    rng = np.random.default_rng()
    B, T = rows
    x = rng.normal(size=(B, T, K)).astype(np.float32).astype(DTYPES[precision])
    weight = (rng.normal(size=(K, N)) / math.sqrt(K)).astype(np.float32)
    bias, addend = rng.normal(size=N).astype(np.float32), rng.normal(size=(B, T, N)).astype(np.float32)
    kernel = kernels.linear(K, N, activation=activation, residual=residual, narrow=narrow)
    out_dtype = kernels.dtype if narrow else "float32"
    arguments = [x, kernels.pack_weight(weight), kernels.table(weight, bias), *([addend] if residual else [])]
    found = executor.run(kernel, *arguments, shape=(B, T, N), dtype=out_dtype)

    rounded = weight.astype(DTYPES[precision]).astype(np.float64)
    expected = ACTIVATIONS[activation](x.astype(np.float64) @ rounded + bias)
    expected += addend if residual else 0
    of_result = UNIT_ROUNDOFF[precision] if narrow else 0.0
    of_inputs = 2 * UNIT_ROUNDOFF[precision] if precision == "tf32" else 0.0  # the kernel rounds both itself
    magnitude = np.abs(x.astype(np.float64)) @ np.abs(rounded) + np.abs(bias) + 1
    tolerance = of_result * np.abs(expected) + (of_inputs + K * 2.0**-24) * magnitude
    return share_of_tolerance(found, expected, tolerance)


def reference_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, pos: int = 0) -> np.ndarray:
    """Attend in float64, one head: q [T, hs] of positions pos … pos + T - 1, k and v [pos + T, hs]."""
    scores = q @ k.T * scale
    scores[np.arange(len(k)) > pos + np.arange(len(q))[:, None]] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


def split_heads(qkv: np.ndarray, nh: int) -> np.ndarray:
    """Split qkv [B, T, 3 · nh · hs] to [3, B, nh, T, hs]."""
    B, T, width = qkv.shape
    return qkv.reshape(B, T, 3, nh, width // 3 // nh).transpose(2, 0, 3, 1, 4)


def attention_tolerance(v: np.ndarray, precision: str) -> float:
    """Bound the error: the weights, which add up to 1, and the result are rounded; accumulation is in float32."""
    return 2.5 * UNIT_ROUNDOFF[precision] * float(np.abs(v).max())


def check_causal_attention(executor: Executor, precision: str, B: int, T: int, nh: int, hs: int) -> float:
    """Compare causal attention of whole sequences."""
    C = nh * hs
    qkv = np.random.default_rng().normal(size=(B, T, 3 * C)).astype(np.float32).astype(DTYPES[precision])
    kernel = CudaKernels(precision, executor.launcher).causal_attention(nh, hs, hs**-0.5)
    found = executor.run(kernel, qkv, shape=(B, T, C), dtype=str(qkv.dtype))
    q, k, v = split_heads(qkv.astype(np.float64), nh)
    expected = np.stack(
        [[reference_attention(q[b, h], k[b, h], v[b, h], hs**-0.5) for h in range(nh)] for b in range(B)]
    )
    merged = expected.transpose(0, 2, 1, 3).reshape(B, T, C)
    return share_of_tolerance(found, merged, attention_tolerance(v, precision))


def check_cached_attention(executor: Executor, precision: str, nh: int, hs: int, T: int) -> float:
    """Compare T new tokens over a cache whose sequences have different lengths.

    The cache is NaN beyond each sequence, and only the rows of the new tokens may be written.
    """
    C, length, rng = nh * hs, 300, np.random.default_rng()
    pos = np.array([0, 127, 210])
    B, dtype = len(pos), DTYPES[precision]
    qkv = rng.normal(size=(B, T, 3 * C)).astype(np.float32).astype(dtype)
    caches = [rng.normal(size=(B, nh, length, hs)).astype(np.float32).astype(dtype) for _ in range(2)]
    for cache in caches:
        for b in range(B):
            cache[b, :, pos[b] :] = np.nan
    kernel = CudaKernels(precision, executor.launcher).cached_attention(nh, hs, length, hs**-0.5)
    given = [cache.view(np.uint16) for cache in caches]
    found, *after = executor.run_in_place(kernel, [qkv, pos], given, shape=(B, T, C), dtype=str(qkv.dtype))
    q, k, v = split_heads(qkv, nh)
    for cache, new, got in zip(caches, (k, v), after, strict=True):
        for b in range(B):
            cache[b, :, pos[b] : pos[b] + T] = new[b]
        np.testing.assert_array_equal(got, cache.view(np.uint16))
    keys, values = (cache.astype(np.float64) for cache in caches)
    shares = []
    for b in range(B):
        end = pos[b] + T
        heads = [
            reference_attention(q[b, h].astype(np.float64), keys[b, h, :end], values[b, h, :end], hs**-0.5, int(pos[b]))
            for h in range(nh)
        ]
        expected = np.stack(heads).transpose(1, 0, 2).reshape(T, C)
        tolerance = attention_tolerance(values[b, :, :end], precision)
        shares.append(share_of_tolerance(found[b], expected, tolerance))
    return float(np.max(shares))  # NaN if one of them is


def check_layer_norm(executor: Executor, B: int, T: int, C: int, narrow: bool) -> float:
    """Compare LayerNorm, also of rows far from 0, where E[x²] - E[x]² in float32 would have no digit left."""
    rng = np.random.default_rng()
    x = (rng.normal(size=(B, T, C)) + rng.choice([0, 1000], size=(B, T, 1))).astype(np.float32)
    gain, bias = rng.normal(size=(2, C)).astype(np.float32)
    kernel = CudaKernels("bf16", executor.launcher).layer_norm(C, 1e-5, narrow=narrow)
    found = executor.run(kernel, x, gain, bias, shape=(B, T, C), dtype="bfloat16" if narrow else "float32")
    wide = x.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * gain + bias
    of_x = 2.0**-22 * np.abs(wide).max(-1, keepdims=True) * np.abs(gain)
    tolerance = (2.0**-8 if narrow else 2.0**-20) * (np.abs(expected) + 1) + of_x
    return share_of_tolerance(found, expected, tolerance)


def check_embedding(executor: Executor, B: int, T: int, C: int, behind: bool) -> None:
    """Compare the embedding, whose one addition in float32 must be exact."""
    rng = np.random.default_rng()
    tokens, positions = (rng.normal(size=(rows, C)).astype(np.float32) for rows in (31, 40))
    ids, pos = rng.integers(0, 31, (B, T)), rng.integers(0, 40 - T, B)
    kernel = CudaKernels("bf16", executor.launcher).embedding(31, 40, C, behind=behind)
    found = executor.run(kernel, tokens, ids, positions, *([pos] if behind else []), shape=(B, T, C))
    first = pos[:, None] if behind else 0
    np.testing.assert_array_equal(found, tokens[ids] + positions[first + np.arange(T)])


Sampler = Callable[..., list[np.ndarray]]


def build_sampler(executor: Executor, V: int) -> Sampler:
    """Build the sampling kernel for V tokens as a function of logits [B, V], pos [B], top_k, temperature and seed.

    The function returns ids [B, 1], pos [B] and text [B, TEXT_LENGTH] after the kernel; ids and text were -1 before.
    """
    device, function = executor.build(with_root(CudaKernels("bf16", executor.launcher).sample(V)))

    def sampler(
        logits: np.ndarray, pos: np.ndarray, top_k: int = 1, temperature: float = 1.0, seed: int = 0
    ) -> list[np.ndarray]:
        B = len(logits)
        given = logits[:, None].astype(np.float32), np.array([top_k, temperature, seed], np.float64)
        written = np.full((B, 1), -1), pos.copy(), np.full((B, TEXT_LENGTH), -1)
        tensors = [tvm.runtime.tensor(array, device) for array in (*given, *written)]
        function(*tensors)
        return [tensor.numpy() for tensor in tensors[2:]]

    return sampler


def check_argmax(executor: Executor, V: int, B: int) -> None:
    """With top_k = 1 the largest logit's token goes to ids and to its place in text, and pos is raised."""
    rng = np.random.default_rng()
    logits = rng.normal(size=(B, V)) * 10
    pos = rng.integers(0, TEXT_LENGTH - 1, B)
    ids, after, text = build_sampler(executor, V)(logits, pos)
    np.testing.assert_array_equal(ids[:, 0], logits.astype(np.float32).argmax(-1))
    np.testing.assert_array_equal(after, pos + 1)
    expected = np.full((B, TEXT_LENGTH), -1)
    expected[np.arange(B), pos + 1] = ids[:, 0]
    np.testing.assert_array_equal(text, expected)


def check_ties(executor: Executor) -> None:
    """Check that the first of equal logits is taken."""
    logits = np.zeros((2, 700))
    logits[0, [13, 600]] = 1
    ids, _, _ = build_sampler(executor, 700)(logits, np.zeros(2, np.int64))
    np.testing.assert_array_equal(ids[:, 0], [13, 0])


def check_end_of_text(executor: Executor) -> None:
    """Beyond the last position of text nothing is written, and pos is raised all the same."""
    _, after, text = build_sampler(executor, 65)(np.zeros((1, 65)), np.array([TEXT_LENGTH - 1]))
    np.testing.assert_array_equal(after, [TEXT_LENGTH])
    np.testing.assert_array_equal(text, np.full((1, TEXT_LENGTH), -1))


def check_distribution(executor: Executor, V: int, top_k: int, temperature: float) -> None:
    """Draw for many sequences with the same logits, and hold the frequencies against the softmax by a χ² test.

    A right sampler fails it once in a million runs.
    """
    rng = np.random.default_rng()
    B = 4000 if V < 1000 else 1500
    logits = rng.normal(size=V).astype(np.float32) * 3
    ids, _, _ = build_sampler(executor, V)(
        np.tile(logits, (B, 1)), np.zeros(B, np.int64), top_k, temperature, seed=int(rng.integers(2**31))
    )
    kept = np.sort(logits)[-top_k:].astype(np.float64)
    chances = np.where(logits >= kept[0], np.exp((logits.astype(np.float64) - kept[-1]) / temperature), 0)
    chances /= chances.sum()
    found = np.bincount(ids[:, 0], minlength=V)
    _require((found[chances == 0] == 0).all(), "a token outside the top_k was sampled")
    statistic, most = _chi_squared(found, B * chances)
    _require(statistic <= most, f"frequencies differ from the softmax: χ² is {statistic:.1f}, at most {most:.1f}")


def _chi_squared(found: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """Return the χ² statistic of some counts, and what it exceeds once in a million times.

    Rare values share a cell with others, likeliest first, so that at least 5 are expected in each. The quantile is the
    approximation of Wilson and Hilferty (https://doi.org/10.1073/pnas.17.12.684).
    """
    order = np.argsort(-expected)
    cells = np.maximum.accumulate(np.ceil(np.cumsum(expected[order]) / 5)).astype(int)
    observed, wanted = (np.bincount(cells, weights=each[order]) for each in (found, expected))
    kept = wanted > 0
    statistic = float(((observed[kept] - wanted[kept]) ** 2 / wanted[kept]).sum())
    freedom = int(kept.sum()) - 1
    z = 4.753  # the normal distribution exceeds it once in a million times
    return statistic, freedom * (1 - 2 / (9 * freedom) + z * (2 / (9 * freedom)) ** 0.5) ** 3


def check_unlikely(executor: Executor) -> None:
    """Draw 2,000 times from GPT-2's vocabulary, of which ten tokens alone have a chance: no other is ever sampled.

    Noise that is infinite for one of 2^24 random numbers would win for a token with no chance in most of such runs.
    """
    V, B = 50257, 2000
    logits = np.full(V, -1000.0)
    logits[:10] = 0
    seed = int(np.random.default_rng().integers(2**31))
    ids, _, _ = build_sampler(executor, V)(np.tile(logits, (B, 1)), np.zeros(B, np.int64), V, 1.0, seed)
    _require(int(ids.max()) < 10, f"token {ids.max()} was sampled with seed {seed}, and it has no chance")


def check_seeds(executor: Executor) -> None:
    """The same seed samples the same tokens; another seed, position or sequence samples others."""
    sampler = build_sampler(executor, 211)
    logits = np.zeros((30, 211))
    first, *_ = sampler(logits, np.zeros(30, np.int64), 211, 1.0, 1)
    again, *_ = sampler(logits, np.zeros(30, np.int64), 211, 1.0, 1)
    np.testing.assert_array_equal(first, again)
    other_seed, *_ = sampler(logits, np.zeros(30, np.int64), 211, 1.0, 2)
    other_position, *_ = sampler(logits, np.ones(30, np.int64), 211, 1.0, 1)
    distinct = {tuple(each[:, 0]) for each in (first, other_seed, other_position)}
    _require(len(distinct) == 3, "another seed or position sampled the same tokens")
    _require(len(set(first[:, 0])) > 20, "sequences sampled the same tokens")


def check_temperature_0(executor: Executor) -> None:
    """At temperature 0 the argmax is taken, whatever top_k is."""
    logits = np.random.default_rng().normal(size=(4, 65))
    ids, _, _ = build_sampler(executor, 65)(logits, np.zeros(4, np.int64), 65, 0.0)
    np.testing.assert_array_equal(ids[:, 0], logits.astype(np.float32).argmax(-1))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _cases() -> Iterator[Case]:
    """Yield all cases."""

    def case(test: str, parameters: Sequence[object], check: Callable, *given: object, **named: object) -> Case:
        words = "-".join("x".join(map(str, each)) if isinstance(each, tuple) else str(each) for each in parameters)
        return Case(test, words, partial(_call, check, given, named))

    # Rows: one, few, odd numbers that no tile divides, more than a tile. K and N: small, odd, beyond a large tile.
    for precision, rows in product(DTYPES, (1, 2, 7, 17, 65, 130)):
        yield case("linear::any_number_of_rows", (rows, precision), check_linear, precision, (1, rows), 72, 100)
    for precision, activation in product(DTYPES, ACTIVATIONS):
        yield case(
            "linear::activations_in_the_epilogue", (precision, activation),
            check_linear, precision, (3, 17), 64, 96, activation=activation, narrow=True,
        )  # fmt: skip
    for precision, rows in product(DTYPES, ((1, 1), (3, 1), (3, 17))):
        yield case(
            "linear::residual_and_odd_widths", (precision, rows), check_linear, precision, rows, 40, 65, residual=True
        )
    for precision in DTYPES:
        yield case(
            "linear::the_large_tile", (precision,),
            check_linear, precision, (1, 131), 168, 257, activation="gelu_tanh", narrow=True, multiprocessors=1,
        )  # fmt: skip
    shapes = [(1, 1, 2, 64), (3, 17, 2, 32), (1, 130, 1, 64), (2, 64, 1, 128), (1, 70, 3, 48)]
    for precision, shape in product(HALF, shapes):
        yield case("attention::causal_attention", (*shape, precision), check_causal_attention, precision, *shape)
    for (precision, nh, hs), T in product((("bf16", 2, 64), ("fp16", 1, 80), ("bf16", 1, 128)), (1, 2, 17, 70)):
        parameters = (precision, nh, hs, T)
        yield case("attention::over_a_cache", parameters, check_cached_attention, *parameters)
    for rows_of_C, narrow in product([(1, 1, 64), (3, 17, 100), (1, 6, 768), (1, 2, 33)], (True, False)):
        yield case("norm_embed::layer_norm", (*rows_of_C, narrow), check_layer_norm, *rows_of_C, narrow)
    for rows_of_C, behind in product([(1, 1, 64), (3, 17, 200)], (True, False)):
        yield case("norm_embed::embedding", (*rows_of_C, behind), check_embedding, *rows_of_C, behind)
    for V, B in product((1, 65, 511, 2000), (1, 3)):
        yield case("sampling::the_likeliest_is_written_where_it_belongs", (B, V), check_argmax, V, B)
    yield case("sampling::of_equal_logits_the_first_is_taken", (), check_ties)
    yield case("sampling::behind_the_last_place_nothing_is_written", (), check_end_of_text)
    for V, top_k, temperature in ((65, 2, 1.7), (65, 5, 1.0), (65, 65, 0.7), (50257, 40, 1.0), (50257, 50257, 1.3)):
        given = V, top_k, temperature
        yield case("sampling::draws_follow_the_softmax_of_the_likeliest", given, check_distribution, *given)
    yield case("sampling::a_token_without_a_chance_is_never_drawn", (), check_unlikely)
    yield case("sampling::draws_differ_by_seed_place_and_sequence", (), check_seeds)
    yield case("sampling::at_temperature_0_the_likeliest_is_taken", (), check_temperature_0)


def _call(check: Callable, given: tuple, named: dict[str, Any], executor: Executor) -> float | None:
    return check(executor, *given, **named)


CASES = tuple(_cases())


def cases_of(test: str) -> list[Case]:
    """Return the cases of one test."""
    return [case for case in CASES if case.test == test]


def run_case(case: Case, device: str) -> dict[str, Any]:
    """Run a case on a device: its `name`, `status` (`agrees`, `disagrees`, `not run`), `reason` and ERROR."""
    found: dict[str, Any] = {"name": case.name_on(device), "status": "agrees", "reason": None, ERROR: None}
    if device == "cuda" and gpu_arch() is None:
        return found | {"status": "not run", "reason": NO_GPU}
    with tempfile.TemporaryDirectory() as folder:
        try:
            share = case.check(EXECUTORS[device](Path(folder)))
        except Exception as error:  # a compiler's, TVM's or a comparison's: the other cases are run all the same
            words = " ".join(f"{type(error).__name__}: {error}".split())
            return found | {"status": "disagrees", "reason": words[:MOST_CHARACTERS]}
    if share is None:
        return found
    found[ERROR] = share if math.isfinite(share) else None
    if share <= 1:
        return found
    return found | {"status": "disagrees", "reason": f"its largest error is {share:.3g} times the tolerance"}


def cases_command(
    device: Annotated[tyro.conf.Positional[Device], tyro.conf.arg(metavar="DEVICE")],
    module: str = MODULE,
    output: Path | None = None,
    share: tuple[int, int] = (0, 1),
) -> bool:
    """Run the cases of every CUDA kernel on a device; exits with 1 if one disagrees.

    Args:
        device: cuda, or cpu for the emulator of a GPU's threads
        module: the module that has the CASES
        output: a file that each result is appended to as a line of JSON
        share: I N runs every N-th case from the I-th on, so that N processes share them
    """
    counts = {"agrees": 0, "disagrees": 0, "not run": 0}
    for case in importlib.import_module(module).CASES[share[0] :: share[1]]:
        found = run_case(case, device)
        counts[found["status"]] += 1
        if output is not None:
            with output.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(found, allow_nan=False) + "\n")
        if found["reason"]:
            print(f"{found['name']}: {found['status']}: {found['reason']}")
    print(f"{counts['disagrees']} failed, {counts['agrees']} agree, {counts['not run']} not run")
    return not counts["disagrees"]


def _module_of(kernel: tvm.tirx.PrimFunc) -> tvm.IRModule:
    return tvm.IRModule({"run": kernel.with_attr("global_symbol", "run")})


def _to_tensor(array: np.ndarray, device: tvm.runtime.Device) -> tvm.runtime.Tensor:
    """Copy to a device with the same dtype, which numpy may only know from ml_dtypes."""
    return tvm.runtime.empty(array.shape, str(array.dtype), device).copyfrom(array)


def _to_float64(tensor: tvm.runtime.Tensor) -> np.ndarray:
    array = tensor.numpy()
    if array.dtype == np.uint16:
        array = array.view(ml_dtypes.bfloat16)
    return array.astype(np.float64)


def main() -> None:
    """The command line. Exits with 1 if a case disagrees."""
    if not tyro.cli(cases_command, prog="python -m bench.gpu.cases"):
        sys.exit(1)
