"""Whole models that ONNX Runtime's quantizers and optimizer wrote, against ONNX Runtime on the same file."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

from export.artifact import ExportedModel
from tests.tvm_frontend.frontends.onnx.judge import by_onnxruntime, compiled

Write = Callable[[ExportedModel, Path], None]
Level = onnxruntime.GraphOptimizationLevel
SHAPES = [(1, 1), (2, 7), (1, 33)]


def ids_of(exported: ExportedModel, B: int, T: int) -> np.ndarray:
    return np.random.default_rng(B * T).integers(0, exported.config.vocab_size, (B, T))


class Calibration(CalibrationDataReader):
    """Gives a few batches, of which the ranges of activations are taken."""

    def __init__(self, exported: ExportedModel) -> None:
        self.name = onnx.load(exported.path, load_external_data=False).graph.input[0].name
        self.batches: Iterator[np.ndarray] = (ids_of(exported, 2, T) for T in (5, 40))

    def get_next(self) -> dict[str, np.ndarray] | None:
        ids = next(self.batches, None)
        return None if ids is None else {self.name: ids}


def by_optimizer(exported: ExportedModel, output: Path, level: Level = Level.ORT_ENABLE_EXTENDED) -> None:
    """SkipLayerNormalization, and what else ONNX Runtime fuses on a CPU; at the basic level it folds constants."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = level
    options.optimized_model_filepath = str(output)
    onnxruntime.InferenceSession(str(exported.path), options, providers=["CPUExecutionProvider"])


def dynamic(exported: ExportedModel, output: Path) -> None:
    """int8 weights by column, activations rounded by tensor; 7 bits, as ONNX Runtime saturates without AVX-512."""
    folded = output.with_name("folded.onnx")
    by_optimizer(exported, folded, Level.ORT_ENABLE_BASIC)
    how = {"per_channel": True, "reduce_range": True, "weight_type": QuantType.QInt8}
    quantize_dynamic(folded, output, op_types_to_quantize=["MatMul", "Gather"], **how)


def static(exported: ExportedModel, output: Path) -> None:
    """QuantizeLinear and DequantizeLinear around each product, also of weights that a node transposes before."""
    how = {"quant_format": QuantFormat.QDQ, "reduce_range": True, "weight_type": QuantType.QInt8}
    quantize_static(exported.path, output, Calibration(exported), op_types_to_quantize=["MatMul", "Gelu"], **how)


def four_bits(exported: ExportedModel, output: Path) -> None:
    """MatMulNBits, and GatherBlockQuantized for the tables."""
    folded = output.with_name("folded.onnx")
    by_optimizer(exported, folded, Level.ORT_ENABLE_BASIC)
    config = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=False, op_types_to_quantize=("MatMul", "Gather"))
    quantizer = MatMulNBitsQuantizer(onnx.load(folded), algo_config=config)
    quantizer.process()
    quantizer.model.save_model_to_file(str(output))


# What each writes at least, and whether it rounds activations.
FILES: dict[str, tuple[Write, set[str], bool]] = {
    "dynamic int8": (dynamic, {"DynamicQuantizeLinear", "MatMulInteger"}, True),
    "static int8": (static, {"QuantizeLinear", "DequantizeLinear"}, True),
    "weights of 4 bits": (four_bits, {"MatMulNBits", "GatherBlockQuantized"}, False),
    "optimized": (by_optimizer, {"SkipLayerNormalization"}, False),
}


def root_mean_square(x: np.ndarray) -> float:
    return float(np.sqrt(np.square(x.astype(np.float64)).mean()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_onnxruntimes_tools_gives_its_numbers(kind: str, exported: ExportedModel, tmp_path: Path) -> None:
    write, written, rounds = FILES[kind]
    write(exported, tmp_path / "model.onnx")
    proto = onnx.load(tmp_path / "model.onnx")
    assert written <= {node.op_type for node in proto.graph.node}
    run = compiled(proto, 3)
    for B, T in SHAPES:
        feeds = {proto.graph.input[0].name: ids_of(exported, B, T)}
        (found,), (expected,) = run(feeds), by_onnxruntime(str(tmp_path / "model.onnx"), feeds)
        if rounds:  # a number that is between two integers but for its last bits goes either way, and on to all others
            unrounded = by_onnxruntime(str(exported.path), feeds)[0]
            assert root_mean_square(found - expected) < root_mean_square(unrounded - expected) / 2, (B, T)
        else:
            np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5, err_msg=str((B, T)))
    kernels: Counter[str] = Counter()
    for name, count in run.kernels.items():
        kernels[name.rstrip("0123456789").split("_")[0]] += count
    assert kernels["linear"] == 4 * exported.config.n_layer + 1, run.kernels
    assert kernels["causal"] == exported.config.n_layer, run.kernels
