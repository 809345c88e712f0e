"""Checkpoint to ONNX, proven before it is said to be done.

python -m export.onnx                                  # artifacts/ckpt.pt to artifacts/model.onnx
python -m export.onnx my.pt -o my.onnx --opset 20
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import onnx
import onnxruntime
import torch
import tyro
from tqdm import tqdm

from export.artifact import PRECISIONS, ExportedModel, load_exported, metadata_of
from export.forms import FORMS, entry_point_of
from export.storage import place_weights, remove_other_weights, settle_weights
from export.trace import WEIGHTS, trace
from gpt.checkpoint import Checkpoint, load_checkpoint
from gpt.cli import UserError, run_command
from gpt.files import atomic_output, check_output

DEFAULT_OPSET = 23  # from 23 on, Attention stays one node
# What each of torch's exporters really writes: dynamo writes 18 for 13 to 16 and breaks at 26.
EXPORTERS = {"dynamo": range(18, 26), "torchscript": range(18, 21)}
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


@dataclass(frozen=True)
class Request:
    """What is asked for: a form (`forward`, `cached`, `past`), its opset, which of torch's exporters, which precision.

    last: logits of the last position only. Raises UserError for what cannot be.
    """

    form: str = "forward"
    opset: int | None = None
    exporter: str = "dynamo"
    precision: str = "fp32"
    last: bool = False

    def __post_init__(self) -> None:
        for name, known in (("form", FORMS), ("exporter", EXPORTERS), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise UserError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(known)}")
        if self.opset is None:
            default = max(DEFAULT_OPSET, FORMS[self.form].oldest_opset)
            object.__setattr__(self, "opset", min(default, EXPORTERS[self.exporter][-1]))
        self._check_opset()

    def _check_opset(self) -> None:
        opsets, oldest = EXPORTERS[self.exporter], FORMS[self.form].oldest_opset
        if oldest > opsets[-1]:
            raise UserError(
                f"{self.form} with the {self.exporter} exporter: it needs opset {oldest}, this exporter writes up to "
                f"{opsets[-1]}; use --exporter dynamo"
            )
        if self.opset not in opsets:
            raise UserError(
                f"opset {self.opset}: must be {opsets[0]} to {opsets[-1]} with the {self.exporter} exporter; "
                "23 and later keep Attention as one node"
            )
        if self.opset < oldest:
            raise UserError(f"opset {self.opset}: {self.form} needs {oldest} or later; leave out --opset or raise it")

    @property
    def default_name(self) -> str:
        """The file's name where none is given, one for each kind: model.onnx, model-cache-bf16.onnx, …"""
        words = [FORMS[self.form].suffix, "last" * self.last, self.precision if self.precision != "fp32" else ""]
        return "-".join(["model", *filter(None, words)]) + ".onnx"


def export_onnx(
    checkpoint_path: Path,
    output: Path,
    opset: int | None = None,
    *,
    form: str = "forward",
    exporter: str = "dynamo",
    precision: str = "fp32",
    last: bool = False,
) -> ExportedModel:
    """Write one form of a checkpoint, in its file a proof that it computes what eager does: see `export.forms`.

    Before the file gets its name it is checked by onnx and run in ONNX Runtime against eager. Raises UserError for a
    bad checkpoint, output or request (see `Request`), RuntimeError if the file does not compute what eager does.
    """
    return _export(checkpoint_path, output, Request(form, opset, exporter, precision, last))[0]


def _export(checkpoint_path: Path, output: Path, request: Request) -> tuple[ExportedModel, list[Proof]]:
    check_output(output)
    checkpoint = load_checkpoint(checkpoint_path)
    entry_point_of(FORMS[request.form], checkpoint.config, "float32", request.last)  # refuses before the work
    with tqdm(total=3, desc="export", unit="step", leave=False) as bar, atomic_output(output) as part:
        weights = _write(checkpoint, request, part)
        bar.update()
        proofs = prove(checkpoint, part, request)
        bar.update()
        place_weights(weights, output)
    remove_other_weights(weights, output)
    return load_exported(output), proofs


def _write(checkpoint: Checkpoint, request: Request, part: Path) -> Path | None:
    """Trace, settle the weights and write the graph to `part`; the second file, if there is one."""
    form, dtype = FORMS[request.form], PRECISIONS[request.precision]
    proto = trace(checkpoint, form, request.opset, request.exporter, dtype, request.last, part.parent)
    weights = settle_weights(proto, part.with_name(WEIGHTS), part)
    metadata = metadata_of(
        config=checkpoint.config,
        tokenizer=checkpoint.tokenizer,
        entry_points={form.name: entry_point_of(form, checkpoint.config, dtype, request.last)},
        dtype=dtype,
        exporter=f"torch.onnx {request.exporter}, torch {torch.__version__}, onnx {onnx.__version__}",
        checkpoint_sha256=checkpoint.sha256,
        weights=weights,
        proto=proto,
    )
    onnx.helper.set_model_props(proto, metadata)
    part.write_bytes(proto.SerializeToString())
    return weights


def prove(checkpoint: Checkpoint, path: Path, request: Request) -> list[Proof]:
    """Run an exported file in ONNX Runtime against eager, at T = 1, an odd T and block_size, on random ids.

    Raises RuntimeError if any logit is off by more than the tolerance.
    """
    onnx.checker.check_model(str(path), full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # TensorScatter warns at each call that is not in place
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    model = checkpoint.build("explicit")
    random = np.random.default_rng(SEED)
    block_size = checkpoint.config.block_size
    proofs = []
    for B, T in ((1, 1), (3, min(17, block_size)), (1, block_size)):
        ids = random.integers(0, checkpoint.config.vocab_size, (B, T))
        with torch.inference_mode():
            expected = model(torch.from_numpy(ids)).numpy()  # [B, T, V]
        logits = _run(session, ids)
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


def _run(session: onnxruntime.InferenceSession, ids: np.ndarray) -> np.ndarray:
    """The logits of a prompt by any form, its cache empty."""
    inputs = session.get_inputs()
    feed = {inputs[0].name: ids}
    for value in inputs[1:]:
        if value.name == "pos":
            feed["pos"] = np.zeros(ids.shape[0], np.int64)
        else:
            nh, length, hs = value.shape[1:]
            feed[value.name] = np.zeros((ids.shape[0], nh, 0 if length == "P" else length, hs), np.float32)
    return session.run(["logits"], feed)[0]


def export_command(
    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CKPT")] = Path("artifacts/ckpt.pt"),
    output: Annotated[
        Path | None,
        tyro.conf.arg(
            aliases=["-o"],
            metavar="ONNX",
            help_behavior_hint="(default: model.onnx, model-cache.onnx, … beside the checkpoint)",
        ),
    ] = None,
    cache: Literal["static", "past"] | None = None,
    with_cache: tyro.conf.FlagCreatePairsOff[bool] = False,
    last: tyro.conf.FlagCreatePairsOff[bool] = False,
    opset: Annotated[
        int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: 23; 24 for a static cache)")
    ] = None,
    exporter: Literal["dynamo", "torchscript"] = "dynamo",
    precision: Literal["fp32", "fp16", "bf16"] = "fp32",
) -> None:
    """Export a checkpoint to ONNX and prove in ONNX Runtime that it computes what eager PyTorch does.

    Args:
        checkpoint: a file written by python -m gpt.train
        output: the ONNX file to write
        cache: static: a step over a preallocated KV cache; past: a step after past keys and values, as others' tools
        with_cache: the same as --cache static
        last: logits of the last position only
        opset: of the ONNX operators, 18 to 25; from 23 on Attention, Gelu and LayerNormalization are single nodes
        exporter: which of torch's exporters; torchscript, the former, writes up to opset 20
        precision: of weights and caches; logits are fp32 in any case
    """
    if with_cache and cache == "past":
        raise UserError("--with-cache and --cache past are two forms; give one of them")
    form = {None: "forward", "static": "cached", "past": "past"}[cache or ("static" if with_cache else None)]
    request = Request(form, opset, exporter, precision, last)
    exported, proofs = _export(checkpoint, output or checkpoint.with_name(request.default_name), request)
    print("ONNX Runtime against eager PyTorch, float32, random ids:")
    print(f"{'B':>4} {'T':>5} {'max abs err':>12} {'largest logit':>14} {'top-1 equal':>12}")
    for proof in proofs:
        print(f"{proof.B:>4} {proof.T:>5} {proof.max_abs_err:>12.1e} {proof.scale:>14.2f} {proof.top1_match:>12.1%}")
    size_mb = exported.size_bytes / 1e6
    print(f"wrote {exported.path} ({size_mb:.1f} MB, opset {exported.opset}, sha256 {exported.sha256[:12]})")


def main() -> None:
    """Parse the command line and export."""
    tyro.cli(export_command, prog="python -m export.onnx")


if __name__ == "__main__":
    run_command(main)
