"""The engines for a GPU, on a CPU as far as it goes: right numbers, one after the other and in a loop."""

from collections.abc import Callable

import numpy as np
import onnxruntime
import pytest

from bench.backends import engine_names
from bench.correctness.agreement import compare_steps, compare_tokens, random_ids
from bench.gpu.device import DeviceArtifacts
from bench.gpu.engine import DeviceEngine
from bench.gpu.engines import find_candidates, takes_any_shape
from bench.gpu.engines.eager import Engine as Eager
from bench.gpu.engines.inductor import Engine as Inductor
from bench.gpu.engines.onnxruntime import CUDA, refuse_fallback
from bench.gpu.engines.onnxruntime import Engine as OnnxRuntime
from bench.gpu.engines.sdpa import Engine as Sdpa
from bench.gpu.engines.tvm import Engine as Tvm
from bench.gpu.phases import DEVICE_PHASES
from bench.gpu.reference import Reference
from bench.models.build import BUILD_RULES, SEEDED, prepare
from gpt.cli import UserError
from tvm_frontend.artifact import load_compiled
from tvm_frontend.cuda_toolchain import cubin_archs, find_compiler, gpu_arch
from tvm_frontend.runtime import open_session

pytestmark = pytest.mark.slow

CONFIG = SEEDED["tiny"]
Load = Callable[..., DeviceEngine]  # of a class, and the name of a variant


@pytest.fixture
def loaded(artifacts: DeviceArtifacts) -> Load:
    """Load a variant of an engine, with the files that it needs."""

    def load(engine: type[DeviceEngine], variant: str = "") -> DeviceEngine:
        name = engine.__module__.rsplit(".", 1)[1]
        needed = [each for each in find_candidates([name], "llvm") if each.variant == variant]
        prepare(artifacts, needed, DEVICE_PHASES)
        found = engine()
        found.load(artifacts, CONFIG, 1, variant)
        return found

    return load


@pytest.mark.parametrize(
    ("engine", "variant", "precision"),
    [(Eager, "", "bf16"), (Sdpa, "", "bf16"), (Inductor, "", "bf16"), (OnnxRuntime, "CUDA fp16", "fp16")],
)
def test_it_computes_what_the_reference_does(
    loaded: Load, artifacts: DeviceArtifacts, engine: type[DeviceEngine], variant: str, precision: str
) -> None:
    """A prompt, steps behind it, a step again, a shorter prompt of another batch, and tokens of its own choice."""
    ids = random_ids(CONFIG, 3, 16, seed=5)
    reference = Reference()
    reference.load(artifacts, CONFIG, 1, "")
    allowed = reference.allowed(precision, None, seed=0)
    tested = loaded(engine, variant)
    steps = [tested.fill(ids[:, :5])]
    steps += [tested.decode(ids[:, at : at + 1], at) for at in (5, 6, 5)]
    agreement = compare_steps(reference.logits_at(ids, [4, 5, 6, 5]), steps, allowed)
    assert agreement.agrees, agreement
    assert all(seconds > 0 for seconds in tested.samples("decode", (ids[:, 5:6], 5), 0.001))
    if tested.any_shape:
        again = compare_steps(reference.logits_at(ids[:1, :1], [0]), [tested.fill(ids[:1, :1])], allowed)
        assert again.agrees, again
    tokens = tested.generate(ids[:, :5], 4)
    seen = np.concatenate([ids[:, :5], tokens[:, :-1]], axis=1)
    agreement = compare_tokens(reference.logits_at(seen, range(4, 8)), tokens, allowed)
    assert agreement.agrees, agreement


def test_the_cache_of_a_compiled_step_grows_and_keeps_what_it_holds(
    loaded: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.gpu.engines.inductor.ROWS", (4, 100))
    tested = loaded(Inductor)
    monkeypatch.setattr(tested, "_run", lambda compiled, *inputs: inputs[0][:, -1:].float())
    tested.fill(random_ids(CONFIG, 2, 3, seed=1))
    assert tested._keys[0].shape[2] == 4
    tested._keys[0][:, :, :4], before = 2.0, tested._keys[0]
    tested._next(tested._put(np.zeros((2, 1), np.int64)), 4)
    assert tested._keys[0].shape[2] == CONFIG.block_size
    assert (tested._keys[0][:, :, :4] == before).all()


def test_flash_is_seen_to_run(loaded: Load) -> None:
    assert "_scaled_dot_product_flash_attention" in loaded(Sdpa).notes()["attention"]


def test_another_attention_than_flash_is_an_error(loaded: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    tested = loaded(Sdpa)
    for block in tested._model.transformer.h:
        block.attn.attend = lambda q, k, v, _dropout, _scale: q
    with pytest.raises(RuntimeError, match="flash was forced, and torch ran no fused attention"):
        tested.notes()


def test_logits_from_another_device_are_an_error(loaded: Load) -> None:
    tested = loaded(Eager)
    logits = tested._first(tested._put(random_ids(CONFIG, 1, 3, seed=2)))
    tested.device = "cuda"
    with pytest.raises(RuntimeError, match="the logits are on cpu, and were to be computed on cuda"):
        tested._to_numpy(logits)


def test_a_session_that_silently_fell_back_to_the_cpu_is_an_error(loaded: Load) -> None:
    """As ONNX Runtime does where there is no CUDA."""
    path = loaded(OnnxRuntime, "CUDA fp16")._path
    got = onnxruntime.InferenceSession(str(path), providers=[CUDA]).get_providers()
    if got[0] == CUDA:
        pytest.skip("here ONNX Runtime has CUDA, and nothing to fall back from")
    with pytest.raises(RuntimeError, match=f"asked for {CUDA}, got CPUExecutionProvider"):
        refuse_fallback([CUDA], got)


def test_a_model_compiled_for_the_cpu_is_not_taken_for_a_gpu(artifacts: DeviceArtifacts, loaded: Load) -> None:
    loaded(Tvm, "O0")
    on_gpu = DeviceArtifacts(artifacts.folder, "cuda", "llvm")
    with pytest.raises(RuntimeError, match="was compiled for llvm, and is to run on cuda"):
        Tvm().load(on_gpu, CONFIG, 1, "O0")


def test_each_engine_with_a_cache_has_all_phases_and_its_files_can_be_made_for_any_gpu() -> None:
    for target in ("llvm", "sm_80", "sm_86", "sm_90"):
        for candidate in find_candidates([], target):
            assert set(candidate.phases) == ({"first-token"} if candidate.engine == "relay" else set(DEVICE_PHASES))
            assert {file for _, file in candidate.files} <= {"ckpt.pt", *BUILD_RULES}
    labels = {each.label for each in find_candidates([], "sm_90")}
    assert {"tvm O0", "tvm O3", "inductor", "inductor max-autotune", "onnxruntime TensorRT fp16"} <= labels
    assert {each.engine for each in find_candidates([], "llvm")} == set(engine_names("bench.gpu.engines"))


def test_engines_that_compile_for_a_shape_are_known() -> None:
    any_shape = {each.engine: takes_any_shape(each) for each in find_candidates([], "llvm")}
    of_each_shape = dict.fromkeys(("inductor", "onnxruntime", "relay"), False)
    assert any_shape == dict.fromkeys(("eager", "sdpa", "tvm"), True) | of_each_shape


@pytest.mark.relay
def test_relay_is_taken_only_if_asked() -> None:
    (unasked,) = (each for each in find_candidates([], "sm_86") if each.engine == "relay")
    assert "--engine relay asks for it" in unasked.absent
    (asked,) = find_candidates(["relay"], "sm_86")
    assert (asked.absent, asked.files) == (None, (("first-token", "tvm-sm_86-O3-unproven-relay"),))


@pytest.mark.relay
def test_relays_file_is_compiled_for_the_gpu_and_a_machine_without_one_says_so(artifacts: DeviceArtifacts) -> None:
    try:
        find_compiler("nvcc")
    except UserError as error:
        pytest.skip(str(error))
    prepare(artifacts, find_candidates(["relay"], "sm_86"), DEVICE_PHASES, [(1, 3)])
    model = load_compiled(artifacts.folder / "tvm-sm_86-O3-unproven-relay" / "1x3")
    assert cubin_archs(model.library("sm_86").read_bytes()) == {"sm_86"}
    if gpu_arch() is None:
        with pytest.raises(UserError, match="needs a GPU that runs sm_86, and this machine shows none"):
            open_session(model)


def test_an_unknown_engine_names_the_known() -> None:
    with pytest.raises(UserError, match="engine 'openvino': not known; known are eager, inductor"):
        find_candidates(["openvino"], "sm_90")
