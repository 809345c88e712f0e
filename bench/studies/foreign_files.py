"""Exports tiny models as other people do, and changes the files as other people's tools do.

python -m bench.studies.foreign_files FOLDER --with torch      # torch.onnx's files, in this project's environment
python -m bench.studies.foreign_files FOLDER --with optimum    # Optimum's, in .venv-matrix
python -m bench.studies.foreign_files FOLDER --with tools      # the variants of both, in .venv-matrix

A file that is there is not made again. What an exporter or a tool refuses is in FOLDER/…-refused.json, with its words.
"""

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from bench.studies.foreign import OWN_LAYOUTS, make_model
from bench.studies.foreign_feeds import LONGEST, feed
from bench.studies.foreign_recipes import OPTIMUM, PLAIN, REFUSED, TOOLS, TORCH, VERSIONS, Recipe, recipes

PACKAGES = (
    "torch",
    "onnxscript",
    "transformers",
    "optimum",
    "optimum-onnx",
    "onnx",
    "onnxruntime",
    "onnxsim",
    "onnxslim",
    "onnxconverter-common",
)


def export(recipe: Recipe, output: Path) -> None:
    """Export a model, plain."""
    if recipe.exporter.startswith(OPTIMUM):
        _by_optimum(recipe, output)
    else:
        _by_torch(recipe, output)


def _by_torch(recipe: Recipe, output: Path) -> None:
    """Export by torch.onnx, of token ids alone, or with a mask, or with a mask and a cache."""
    kind, _, more = recipe.exporter.partition("-")
    # Opset 11 has no operator for PyTorch's attention, and the oldest exports are of attention that is written out.
    model: Any = make_model(recipe.model, "eager" if recipe.opset < 14 else "sdpa", use_cache=more == "past")
    ids = torch.arange(10).reshape(2, 5)
    if recipe.model in OWN_LAYOUTS:
        given: dict[str, Any] = {"idx": ids}
    else:
        given = {"input_ids": ids} | ({"attention_mask": torch.ones_like(ids)} if more else {})
        model = _OfTensors(model).eval()
    sizes: dict[str, Any] = {name: {0: "batch", 1: "sequence"} for name in (*given, "logits")}
    outputs = ["logits"]
    if kind == "torchscript":
        inputs = tuple(given.values())
        torch.onnx.export(
            model,
            inputs,
            output,
            input_names=list(given),
            output_names=outputs,
            opset_version=recipe.opset,
            dynamo=False,
            dynamic_axes=sizes,
        )
        return
    auto = torch.export.Dim.AUTO
    shapes: dict[str, Any] = {name: {0: auto, 1: auto} for name in given}
    names = list(given)
    if more == "past":
        cache = model.model(ids[:, :3], use_cache=True).past_key_values
        past = [part for layer in cache.layers for part in (layer.keys, layer.values)]
        given |= {"attention_mask": torch.ones(2, 8, dtype=torch.long), "past_key_values": past}
        shapes["past_key_values"] = [{0: auto, 2: auto}] * len(past)
        names += _of_cache("past_key_values", len(cache.layers))
        outputs += _of_cache("present", len(cache.layers))
    torch.onnx.export(
        model,
        kwargs=given,
        f=output,
        input_names=names,
        output_names=outputs,
        opset_version=recipe.opset,
        dynamo=True,
        dynamic_shapes=shapes,
        external_data=False,
        verbose=False,
    )


def _of_cache(what: str, layers: int) -> list[str]:
    return [f"{what}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


class _OfTensors(torch.nn.Module):
    """Calls a model of transformers with tensors alone, as exporters know none of its objects."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: list[torch.Tensor] | None = None,
    ) -> Any:
        """Return logits, and the keys and values of each layer if those of a past are given."""
        if past_key_values is None:
            return self.model(input_ids, attention_mask=attention_mask).logits
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(past_key_values[::2], past_key_values[1::2], strict=True)):
            cache.update(keys, values, layer)
        found = self.model(input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True)
        return found.logits, *(part for layer in found.past_key_values.layers for part in (layer.keys, layer.values))


def _by_optimum(recipe: Recipe, output: Path) -> None:
    """Export by Optimum, for generation without or with a past."""
    from optimum.exporters.onnx import main_export

    past = recipe.exporter.endswith("past")
    with tempfile.TemporaryDirectory() as folder:
        make_model(recipe.model, use_cache=past).save_pretrained(f"{folder}/model")
        main_export(
            f"{folder}/model",
            f"{folder}/onnx",
            task="text-generation-with-past" if past else "text-generation",
            opset=recipe.opset,
            do_validation=False,
            library_name="transformers",
        )
        onnx.save(onnx.load(f"{folder}/onnx/model.onnx"), output)


def change(recipe: Recipe, plain: Path, output: Path) -> None:
    """Make a variant of a plain file."""
    CHANGES[recipe.variant](plain, output, recipe)


def _simplified(plain: Path, output: Path, recipe: Recipe) -> None:
    import onnxsim

    model, sound = onnxsim.simplify(onnx.load(plain))
    if not sound:
        raise RuntimeError("onnxsim: its own check of the simplified file failed")
    onnx.save(model, output)


def _slimmed(plain: Path, output: Path, recipe: Recipe) -> None:
    import onnxslim

    onnx.save(onnxslim.slim(onnx.load(plain)), output)


def _fp16(plain: Path, output: Path, recipe: Recipe) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(plain), keep_io_types=False), output)


def _fp16_inside(plain: Path, output: Path, recipe: Recipe) -> None:
    from onnxconverter_common.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(plain), keep_io_types=True), output)


def _int8(plain: Path, output: Path, recipe: Recipe) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # Weights of 7 bits: with 8, ONNX Runtime's own sums saturate on CPUs without VNNI, and it would be no reference.
    per_channel = len(recipe.model) % 2 == 0
    quantize_dynamic(plain, output, weight_type=QuantType.QInt8, per_channel=per_channel, reduce_range=True)


def _qdq(plain: Path, output: Path, recipe: Recipe) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = feeds(plain)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.rest, None)

    quantize_static(
        plain,
        output,
        Reader(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8 if len(recipe.model) % 2 else QuantType.QInt8,
        weight_type=QuantType.QInt8,
        per_channel=len(recipe.exporter) % 2 == 0,
    )


def _int4(plain: Path, output: Path, recipe: Recipe) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load(plain), block_size=16, is_symmetric=len(recipe.model) % 2 == 0)
    quantizer.process()
    onnx.save(quantizer.model.model, output)


def _ort(plain: Path, output: Path, recipe: Recipe) -> None:
    """Let ONNX Runtime write down what it makes of a file, for any CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(output)
    onnxruntime.InferenceSession(str(plain), options, providers=["CPUExecutionProvider"])


def _fused(plain: Path, output: Path, recipe: Recipe) -> None:
    """Fuse by ONNX Runtime's optimiser of transformers, into its own attention and normalisation operators."""
    from onnxruntime.transformers import optimizer
    from onnxruntime.transformers.fusion_options import FusionOptions

    kind = {"gpt-neox": "gpt_neox"}.get(recipe.model, "gpt2")
    options = FusionOptions(kind)
    options.use_multi_head_attention = recipe.model in ("llama", "qwen2")
    heads = 1 if recipe.model.endswith("one-head") else 4
    fused = optimizer.optimize_model(
        str(plain), kind, num_heads=heads, hidden_size=48, optimization_options=options, opt_level=0
    )
    if not any(node.domain == "com.microsoft" for node in fused.model.graph.node):
        raise RuntimeError("onnxruntime.transformers.optimizer: nothing was fused")
    fused.save_model_to_file(str(output))


CHANGES: dict[str, Callable[[Path, Path, Recipe], None]] = {
    "simplified": _simplified,
    "slimmed": _slimmed,
    "fp16": _fp16,
    "fp16-inside": _fp16_inside,
    "int8": _int8,
    "qdq": _qdq,
    "int4": _int4,
    "ort": _ort,
    "fused": _fused,
}


def feeds(path: Path) -> Iterator[dict[str, np.ndarray]]:
    """Yield some inputs of a file, to calibrate it by: of the longest sequences, and after a past."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs = [(value.name, value.type, value.shape) for value in session.get_inputs()]
    rng = np.random.default_rng(0)
    past = any(name.startswith("past") for name, _, _ in inputs)
    for B, P, T in [(2, 0, LONGEST), (1, 0, 9)] + ([(2, 11, 1), (2, 20, 3)] if past else []):
        yield feed(inputs, rng, B, P, T)


def make(folder: Path, recipe: Recipe, refused: dict[str, str]) -> None:
    """Make a file in a folder, or write down why not."""
    output = folder / recipe.name
    if output.exists() or recipe.name in refused:
        return
    plain = folder / Recipe(recipe.model, recipe.exporter, recipe.opset).name
    if recipe.variant != PLAIN and not plain.exists():
        refused[recipe.name] = f"there is no plain file: {refused.get(plain.name, 'it was not made')}"
        return
    with tempfile.TemporaryDirectory(dir=folder) as part:
        made = Path(part) / "model.onnx"
        try:
            export(recipe, made) if recipe.variant == PLAIN else change(recipe, plain, made)
        except Exception as error:  # whatever it is, it is what this exporter or tool says of the model
            said = " ".join(str(error).split())
            refused[recipe.name] = f"{type(error).__name__}: {said[:300]}"
            return
        made.replace(output)


def main() -> None:
    """Parse the command line and make files."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--with", dest="what", choices=(TORCH, OPTIMUM, TOOLS), required=True)
    parser.add_argument("--again", action="store_true", help="try again what was refused")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    wanted = []
    for recipe in recipes():
        by = TOOLS if recipe.variant != PLAIN else OPTIMUM if recipe.exporter.startswith(OPTIMUM) else TORCH
        if by == arguments.what:
            wanted.append(recipe)
    words = arguments.folder / f"{arguments.what}-{REFUSED}"
    refused = json.loads(words.read_text()) if words.exists() and not arguments.again else {}
    here = {name: version(name) for name in PACKAGES if any(distributions(name=name))}
    (arguments.folder / f"{arguments.what}-{VERSIONS}").write_text(json.dumps(here, indent=1))
    for number, recipe in enumerate(wanted):
        make(arguments.folder, recipe, refused)
        words.write_text(json.dumps(refused, indent=1))
        print(
            f"{number + 1}/{len(wanted)} {recipe.name} {refused.get(recipe.name, 'made')[:150]}",
            file=sys.stderr,
            flush=True,
        )


if __name__ == "__main__":
    main()
