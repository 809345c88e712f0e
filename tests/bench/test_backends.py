"""Tests the registry of engines, the check of their inputs, and the effect of an absent package."""

import importlib.util
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import onnxruntime
import pytest

import bench.backends
from bench.backends import Backend, Variant, engine_names, find_candidates
from bench.backends.eager import gpt_of
from bench.correctness.agreement import PRECISIONS
from bench.harness.work import PHASES
from bench.models.artifacts import CHECKPOINT, Artifacts
from bench.models.build import BUILD_RULES, SEEDED
from gpt.checkpoint import seeded_checkpoint
from gpt.cli import UserError

V, BLOCK_SIZE = SEEDED["tiny"].vocab_size, SEEDED["tiny"].block_size


class Counting(Backend):
    """Predicts the number after the last token, and records in `calls` the calls that passed the checks."""

    variants: ClassVar[dict[str, Variant]] = {"": Variant({})}

    def _load(self, *_: object) -> None:
        self.calls: list[tuple] = []

    def _prefill(self, ids: np.ndarray) -> np.ndarray:
        self.calls.append(("prefill", ids.shape))
        return np.eye(V, dtype=np.float32)[(ids + 1) % V]

    def _fill(self, ids: np.ndarray) -> np.ndarray:
        self.calls.append(("fill", ids.shape))
        return np.eye(V, dtype=np.float32)[(ids[:, -1] + 1) % V]

    def _decode(self, ids: np.ndarray, context: int) -> np.ndarray:
        self.calls.append(("decode", context))
        return np.eye(V, dtype=np.float32)[(ids[:, -1] + 1) % V]

    def versions(self) -> dict[str, str]:
        return {}


@pytest.fixture
def engine() -> Counting:
    """Provide a loaded engine."""
    found = Counting()
    found.load(Artifacts(Path()), SEEDED["tiny"], 1, "")
    return found


@pytest.fixture
def without_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a machine without the package openvino."""
    real = importlib.util.find_spec
    monkeypatch.setattr(bench.backends, "find_spec", lambda name: None if name == "openvino" else real(name))


def test_the_folder_is_the_registry() -> None:
    files = {path.stem for path in Path(bench.backends.__file__).parent.glob("*.py")} - {"__init__"}
    assert set(engine_names()) == files
    assert {candidate.engine for candidate in find_candidates()} == files  # engines that cannot run here included


def test_engines_meet_at_one_precision() -> None:
    for precision in PRECISIONS.keys() - {"fp16"}:  # a precision that no engine has on a CPU
        assert {candidate.precision for candidate in find_candidates((), [precision])} == {precision}
    assert {candidate.precision for candidate in find_candidates()} == {"fp32"}
    both = find_candidates(["openvino"], ["fp32", "int4"])
    assert [candidate.label for candidate in both] == ["openvino", "openvino int4"]


def test_an_engine_asked_for_that_has_not_the_precision_says_what_it_has() -> None:
    with pytest.raises(UserError, match="engine 'eager' has no int8, only fp32, bf16"):
        find_candidates(["eager", "tvm"], ["int8"])


def test_onnx_runtime_has_no_product_in_bfloat16() -> None:
    """ONNX Runtime has no bf16 variant for this reason; once this test fails, it can have one."""
    tensors = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.BFLOAT16, [4, 4]) for name in "abc"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("MatMul", ["a", "b"], ["c"])], "g", tensors[:2], tensors[2:])
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=10)
    with pytest.raises(Exception, match="Could not find an implementation for MatMul"):
        onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    reasons = {candidate.engine: candidate.absent for candidate in find_candidates((), ["bf16"])}
    assert reasons["onnxruntime"] == "the CPU provider has no product of matrices in bfloat16"
    with pytest.raises(UserError, match="'onnxruntime' was asked for and is absent: the CPU provider"):
        find_candidates(["onnxruntime"], ["bf16"])
    assert [each.absent is None for each in find_candidates(["onnxruntime"], ["fp32", "bf16"])] == [True, False]


def test_each_variant_is_a_candidate_of_its_own_with_its_phases() -> None:
    untuned, tuned = find_candidates(["tvm"])
    assert (untuned.label, untuned.phases) == ("tvm O0", ("prefill",))
    assert (tuned.label, tuned.phases) == ("tvm O3", ("prefill", "decode", "generate"))


def test_what_an_engine_needs_can_be_made() -> None:
    for candidate in find_candidates((), PRECISIONS):
        assert {phase for phase, _ in candidate.files} <= PHASES.keys()
        assert {file for _, file in candidate.files} <= {CHECKPOINT, *BUILD_RULES}


def test_an_unknown_engine_names_the_known() -> None:
    with pytest.raises(UserError, match=r"'nonesuch'.*eager.*tvm"):
        find_candidates(["nonesuch"])


@pytest.mark.usefixtures("without_openvino")
def test_an_absent_engine_is_found_with_its_reason() -> None:
    reasons = {candidate.engine: candidate.absent for candidate in find_candidates()}
    assert reasons["openvino"] == "not installed: pip install openvino"
    assert reasons["eager"] is None


@pytest.mark.usefixtures("without_openvino")
def test_an_absent_engine_asked_for_is_an_error() -> None:
    with pytest.raises(UserError, match="'openvino' was asked for and is absent: not installed"):
        find_candidates(["eager", "openvino"])


def test_an_engines_file_can_be_read_without_its_package() -> None:
    packages = ("torch", "onnxruntime", "openvino", "tvm", "ctranslate2")
    for path in Path(bench.backends.__file__).parent.glob("*.py"):
        top = [line for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]
        assert not [line for line in top if line.split()[1] in packages], path


def test_tokens_follow_one_another_and_the_last_is_not_fed(engine: Counting) -> None:
    tokens = engine.generate(np.array([[3, 4], [7, 8]]), 3)
    assert tokens.tolist() == [[5, 6, 7], [9, 10, 11]]
    assert tokens.dtype == np.int64
    assert engine.calls == [("fill", (2, 2)), ("decode", 2), ("decode", 3)]


def test_the_whole_block_can_be_generated(engine: Counting) -> None:
    assert engine.generate(np.array([[0]]), BLOCK_SIZE).tolist() == [[token % V for token in range(1, BLOCK_SIZE + 1)]]


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        (np.zeros(4, np.int64), r"ids of shape \[4\]: must be \[B, T\]"),
        (np.zeros((1, 0), np.int64), r"ids of shape \[1, 0\]: must be \[B, T\], with at least one token"),
        (np.zeros((1, 4), np.int32), "ids of dtype int32: must be int64"),
        (np.zeros((1, 4)), "ids of dtype float64: must be int64"),
        (np.array([[0, V]]), rf"token id {V}: must be in 0 … {V - 1}"),
        (np.array([[0, -1]]), "token id -1: must be in"),
        (np.zeros((1, BLOCK_SIZE + 1), np.int64), f"{BLOCK_SIZE + 1} tokens: the model takes at most"),
    ],
)
@pytest.mark.parametrize("method", ["prefill", "fill"])
def test_ids_that_the_model_cannot_take_reach_no_kernel(
    engine: Counting, method: str, ids: np.ndarray, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        getattr(engine, method)(ids)
    assert engine.calls == []


@pytest.mark.parametrize(
    ("ids", "context", "says"),
    [
        ([[V]], 4, f"token id {V}"),
        ([[1]], 0, "context=0: the cache holds 4 tokens"),
        ([[1]], 5, "context=5: the cache holds 4 tokens"),
        ([[1]], -1, "context=-1"),
        ([[1]], BLOCK_SIZE, f"1 tokens after {BLOCK_SIZE} in the cache: the model takes at most"),
        ([[1, 2]], 4, r"ids of shape \[1, 2\]: must be \[1, 1\]"),
        ([[1], [2]], 4, r"ids of shape \[2, 1\]: must be \[1, 1\]"),
    ],
)
def test_a_step_that_does_not_fit_reaches_no_kernel(
    engine: Counting, ids: list[list[int]], context: int, says: str
) -> None:
    engine.fill(np.zeros((1, 4), np.int64))
    with pytest.raises(UserError, match=says):
        engine.decode(np.array(ids), context)
    assert engine.calls == [("fill", (1, 4))]


def test_nothing_is_decoded_before_a_prompt(engine: Counting) -> None:
    with pytest.raises(UserError):
        engine.decode(np.array([[1]]), 1)


@pytest.mark.parametrize("tokens", [0, BLOCK_SIZE - 2])
def test_tokens_that_do_not_fit_are_refused_before_the_first(engine: Counting, tokens: int) -> None:
    with pytest.raises(UserError, match=rf"tokens={tokens}: must be 1 to {BLOCK_SIZE - 3} after a prompt of 4"):
        engine.generate(np.zeros((1, 4), np.int64), tokens)
    assert engine.calls == []


def test_a_prompt_that_failed_leaves_nothing_to_decode_behind(engine: Counting) -> None:
    engine.fill(np.zeros((1, 4), np.int64))
    engine._fill = lambda ids: 1 / 0
    with pytest.raises(ZeroDivisionError):
        engine.fill(np.zeros((1, 3), np.int64))
    with pytest.raises(UserError):
        engine.decode(np.array([[1]]), 3)


def test_a_bigram_is_not_taken_for_a_gpt() -> None:
    model = seeded_checkpoint(SEEDED["tiny"]).build()
    assert gpt_of(model) is model
    with pytest.raises(UserError, match="'bigram': it has no cache and no attention"):
        gpt_of(seeded_checkpoint(SEEDED["bigram"]).build())
