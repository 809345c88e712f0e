"""Checkpoint to ONNX, proven before it is said to be done.

python -m export.onnx                                  # artifacts/ckpt.pt to artifacts/model.onnx
python -m export.onnx my.pt -o my.onnx --opset 20
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import onnxruntime
import torch
import tyro
from tqdm import tqdm

from export.artifact import ExportedModel, load_exported, metadata_of
from gpt.checkpoint import Checkpoint, load_checkpoint
from gpt.cli import UserError, run_command
from gpt.files import atomic_output, check_output

DEFAULT_OPSET = 23  # from 23 on, Attention stays one node
OPSETS = range(18, 26)  # what torch.onnx really writes: for 13 to 16 it writes 18, and it breaks at 26
# Both run the same float32 operations in another order. Logits are sums of n_embd products: 1e-4 of the largest logit
# is some hundred roundings, and a wrong mask, weight or epsilon is off by far more.
TOLERANCE = 1e-4
SEED = 0


@dataclass(frozen=True)
class Proof:
    """One comparison of the file with eager: the shape of the ids and the largest errors of the logits.

    max_abs_err: of any logit. scale: the largest |logit| of eager. top1_match: share of positions with equal argmax.
    """

    B: int
    T: int
    max_abs_err: float
    scale: float
    top1_match: float

    @property
    def agrees(self) -> bool:
        """Whether the error is within the tolerance; NaN is not."""
        return self.max_abs_err <= TOLERANCE * max(1.0, self.scale)


def export_onnx(checkpoint_path: Path, output: Path, opset: int = DEFAULT_OPSET) -> ExportedModel:
    """Write the forward pass of a checkpoint, ids int64 [B, T] to logits float32 [B, T, V], B and T dynamic.

    Before the file gets its name it is checked by onnx and run in ONNX Runtime against eager at three shapes. Raises
    UserError for a bad checkpoint, opset or output, RuntimeError if the file does not compute what eager does.
    """
    return _export(checkpoint_path, output, opset)[0]


def _export(checkpoint_path: Path, output: Path, opset: int) -> tuple[ExportedModel, list[Proof]]:
    if opset not in OPSETS:
        raise UserError(f"opset {opset}: must be {OPSETS[0]} to {OPSETS[-1]}; 23 and later keep Attention as one node")
    check_output(output)
    checkpoint = load_checkpoint(checkpoint_path)
    with tqdm(total=3, desc="export", unit="step", leave=False) as bar:
        proto = _trace(checkpoint, opset)
        _describe(proto, checkpoint)
        bar.update()
        with atomic_output(output) as part:
            _save(proto, part, output)
            bar.update()
            proofs = prove(checkpoint, part)
            bar.update()
    return load_exported(output), proofs


def prove(checkpoint: Checkpoint, path: Path) -> list[Proof]:
    """Run an exported file in ONNX Runtime against eager, at T = 1, an odd T and block_size, on random ids.

    Raises RuntimeError if any logit is off by more than the tolerance.
    """
    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    model = checkpoint.build("explicit")
    random = np.random.default_rng(SEED)
    block_size = checkpoint.config.block_size
    proofs = []
    for B, T in ((1, 1), (3, min(17, block_size)), (1, block_size)):
        ids = random.integers(0, checkpoint.config.vocab_size, (B, T))
        with torch.inference_mode():
            expected = model(torch.from_numpy(ids)).numpy()  # [B, T, V]
        (logits,) = session.run(["logits"], {"ids": ids})
        if logits.shape != expected.shape or logits.dtype != expected.dtype:
            raise RuntimeError(f"{path}: gives {logits.dtype} {logits.shape}, eager {expected.dtype} {expected.shape}")
        proof = Proof(
            B=B,
            T=T,
            max_abs_err=float(np.abs(logits - expected).max()),
            scale=float(np.abs(expected).max()),
            top1_match=float((logits.argmax(-1) == expected.argmax(-1)).mean()),
        )
        if not proof.agrees:
            raise RuntimeError(f"{path}: ONNX Runtime and eager disagree: {proof}")
        proofs.append(proof)
    return proofs


def _trace(checkpoint: Checkpoint, opset: int) -> onnx.ModelProto:
    """The forward pass with `sdpa`, which torch.onnx keeps as one Attention node from opset 23 on."""
    config = checkpoint.config
    model = checkpoint.build("sdpa")
    dynamic = {0: torch.export.Dim.AUTO}
    if config.block_size > 1:
        dynamic[1] = torch.export.Dim("T", min=1, max=config.block_size)
    example = torch.zeros(2, min(config.block_size, 8), dtype=torch.int64)
    with _quiet_exporter():
        program = torch.onnx.export(
            model,
            (example,),
            input_names=["ids"],
            output_names=["logits"],
            opset_version=opset,
            dynamo=True,
            dynamic_shapes=(dynamic,),
            verbose=False,
        )
    proto = program.model_proto
    _name_dimensions(proto)
    _forget_origins(proto)
    written = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    if written != opset:
        raise RuntimeError(f"torch.onnx wrote opset {written} where {opset} was asked for")
    return proto


def _name_dimensions(proto: onnx.ModelProto) -> None:
    """Call the dynamic dimensions B and T, whatever names the exporter made up."""
    names = {}
    for dim, name in zip(proto.graph.input[0].type.tensor_type.shape.dim, ("B", "T"), strict=True):
        if dim.dim_param:
            names[dim.dim_param] = name
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = names.get(dim.dim_param, dim.dim_param)


def _forget_origins(proto: onnx.ModelProto) -> None:
    """Drop the exporter's notes on where each node came from: stack traces with the paths of this machine."""
    for item in (*proto.graph.node, *proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        item.ClearField("metadata_props")
    proto.graph.ClearField("metadata_props")


def _describe(proto: onnx.ModelProto, checkpoint: Checkpoint) -> None:
    metadata = metadata_of(
        config=checkpoint.config,
        tokenizer=checkpoint.tokenizer,
        entry_points={
            "forward": {
                "inputs": {"ids": ["int64", ["B", "T"]]},
                "outputs": {"logits": ["float32", ["B", "T", checkpoint.config.vocab_size]]},
            }
        },
        dtype="float32",
        exporter=f"torch.onnx dynamo, torch {torch.__version__}, onnx {onnx.__version__}",
        checkpoint_sha256=checkpoint.sha256,
        proto=proto,
    )
    onnx.helper.set_model_props(proto, metadata)


def _save(proto: onnx.ModelProto, part: Path, output: Path) -> None:
    try:
        onnx.save(proto, part)
    except ValueError as error:  # protobuf's limit on one message
        raise UserError(f"{output}: a model of over 2 GB does not fit in one ONNX file ({error})") from error


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence what torch.onnx says of packages that we do not use and of its own deprecations."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def export_command(
    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CKPT")] = Path("artifacts/ckpt.pt"),
    output: Annotated[
        Path | None,
        tyro.conf.arg(aliases=["-o"], metavar="ONNX", help_behavior_hint="(default: model.onnx beside the checkpoint)"),
    ] = None,
    opset: int = DEFAULT_OPSET,
) -> None:
    """Export a checkpoint to ONNX and prove in ONNX Runtime that it computes what eager PyTorch does.

    Args:
        checkpoint: a file written by python -m gpt.train
        output: the ONNX file to write
        opset: of the ONNX operators, 18 to 25; from 23 on Attention, Gelu and LayerNormalization are single nodes
    """
    exported, proofs = _export(checkpoint, output or checkpoint.with_name("model.onnx"), opset)
    print("ONNX Runtime against eager PyTorch, float32, random ids:")
    print(f"{'B':>4} {'T':>5} {'max abs err':>12} {'largest logit':>14} {'top-1 equal':>12}")
    for proof in proofs:
        print(f"{proof.B:>4} {proof.T:>5} {proof.max_abs_err:>12.1e} {proof.scale:>14.2f} {proof.top1_match:>12.1%}")
    size_mb = exported.path.stat().st_size / 1e6
    print(f"wrote {exported.path} ({size_mb:.1f} MB, opset {exported.opset}, sha256 {exported.sha256[:12]})")


def main() -> None:
    """Parse the command line and export."""
    tyro.cli(export_command, prog="python -m export.onnx")


if __name__ == "__main__":
    run_command(main)
