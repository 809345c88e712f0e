"""Checkpoint to ONNX, proven before it is said to be done.

python -m export.onnx                                  # artifacts/ckpt.pt to artifacts/model.onnx
python -m export.onnx my.pt -o my.onnx --opset 20
"""

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is one line too
    from gpt.cli import run_main

    run_main("export.onnx")

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent
from typing import Annotated, Literal

import onnx
import onnxscript
import torch
import tyro
from tabulate import tabulate

from export.artifact import PRECISIONS, ExportedModel, load_exported, metadata_of, write_exported
from export.forms import FORMS, entry_point_of
from export.precision import Lacking, add_islands
from export.proof import Proof, prove
from export.storage import place_weights, remove_other_weights, removed_if_failed, settle_weights
from export.trace import WEIGHTS, trace
from gpt.checkpoint import Checkpoint, load_checkpoint
from gpt.cli import UserError
from gpt.files import atomic_output, beside, check_output, find_input, hold_output
from gpt.progress import progress_bar

DEFAULT_OPSET = 23  # from 23 on, Attention stays one node
# Each of torch's exporters really writes these opsets: dynamo writes 18 for 13 to 16 and breaks at 26.
EXPORTERS = {"dynamo": range(18, 26), "torchscript": range(18, 21)}


@dataclass(frozen=True)
class Request:
    """Holds what is asked for: a form (`forward`, `cached`, `past`), its opset, one of torch's exporters, a precision.

    opset: None for the default, see `written_opset`. last: logits of the last position only. Raises UserError for what
    cannot be.
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
        self._check_opset()

    @property
    def written_opset(self) -> int:
        """The opset that was asked for, or else the default of the form and the exporter."""
        if self.opset is not None:
            return self.opset
        return min(max(DEFAULT_OPSET, FORMS[self.form].oldest_opset), EXPORTERS[self.exporter][-1])

    def _check_opset(self) -> None:
        opset = self.written_opset
        opsets, title, oldest = EXPORTERS[self.exporter], FORMS[self.form].title, FORMS[self.form].oldest_opset
        if oldest > opsets[-1]:
            raise UserError(
                f"{title} with the {self.exporter} exporter: it needs opset {oldest}, this exporter writes up to "
                f"{opsets[-1]}; use --exporter dynamo"
            )
        if opset not in opsets:
            raise UserError(
                f"opset {opset}: must be {opsets[0]} to {opsets[-1]} with the {self.exporter} exporter; "
                "23 and later keep Attention as one node"
            )
        if opset < oldest:
            raise UserError(f"opset {opset}: {title} needs {oldest} or later; leave out --opset or raise it")
        if self.exporter == "torchscript" and self.precision == "bf16" and opset < 20:
            raise UserError(
                f"opset {opset} with bf16 and the torchscript exporter: it fills masks by ConstantOfShape, which "
                "knows no bfloat16 before opset 20; leave out --opset"
            )

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
    proof: bool = True,
) -> ExportedModel:
    """Write one form of a checkpoint (see `export.forms`), proven to compute what eager PyTorch does.

    Before the file gets its name it is checked by onnx and run in ONNX Runtime against eager. proof: whether so; for
    who compares what reads the file with eager himself, without it there is none, nor float32 islands where the CPU
    has no kernels of the precision, and the largest models take seconds instead of minutes. Raises UserError for a
    bad checkpoint, output or request (see `Request`), RuntimeError if the file does not compute what eager does.
    """
    return _export(checkpoint_path, output, Request(form, opset, exporter, precision, last), proof)[0]


def _export(
    checkpoint_path: Path, output: Path, request: Request, proof: bool = True
) -> tuple[ExportedModel, Lacking, list[Proof]]:
    check_output(output, checkpoint_path)
    checkpoint = load_checkpoint(checkpoint_path)
    entry_point_of(FORMS[request.form], checkpoint.config, "float32", request.last)  # refuses before the work
    with hold_output(output):
        bar = progress_bar(total=2, desc="export", unit="step", leave=False)
        with bar, removed_if_failed(output), atomic_output(output) as part:
            weights, lacking = _write(checkpoint, request, part, islands=proof)
            bar.update()
            proofs = prove(checkpoint, part) if proof else []
            bar.update()
            place_weights(weights, output)
        remove_other_weights(weights, output)
    return load_exported(output), lacking, proofs


def _write(checkpoint: Checkpoint, request: Request, part: Path, *, islands: bool) -> tuple[Path | None, Lacking]:
    """Trace, cast if need be and `islands`, settle the weights, write the graph to `part`; the second file, if any."""
    form, dtype = FORMS[request.form], PRECISIONS[request.precision]
    assert checkpoint.sha256 is not None  # it was read from a file
    proto = trace(checkpoint, form, request.written_opset, request.exporter, dtype, request.last, part.parent)
    lacking = add_islands(proto, dtype) if islands else Lacking()
    weights = settle_weights(proto, part.with_name(WEIGHTS), part)
    metadata = metadata_of(
        config=checkpoint.config,
        tokenizer=checkpoint.tokenizer,
        entry_points={form.name: entry_point_of(form, checkpoint.config, dtype, request.last)},
        dtype=dtype,
        exporter=f"torch.onnx {request.exporter}, torch {torch.__version__}, onnxscript {onnxscript.__version__}, "
        f"onnx {onnx.__version__}",
        checkpoint_sha256=checkpoint.sha256,
        fp32_islands=lacking.islands,
        weights=weights,
    )
    onnx.helper.set_model_props(proto, metadata)
    write_exported(proto, part)
    return weights, lacking


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
        checkpoint: what python -m gpt.train wrote, or a GPT-2 that others saved
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
    checkpoint = find_input(checkpoint)
    exported, lacking, proofs = _export(checkpoint, output or beside(checkpoint, request.default_name), request)
    print("\n".join([*_precision_lines(lacking, exported.dtype), *_proof_lines(proofs)]))
    size_mb = exported.size_bytes / 1e6
    print(
        f"wrote {exported.path} ({exported.form}, {size_mb:.1f} MB, opset {exported.opset}, {exporter}, {precision}, "
        f"sha256 {exported.sha256[:12]})"
    )


def _precision_lines(lacking: Lacking, dtype: str) -> Iterator[str]:
    if lacking.islands:
        yield f"float32 islands, as ONNX Runtime's CPU provider has no {dtype} kernel of: {', '.join(lacking.islands)}"
    if lacking.silent:
        yield f"ONNX Runtime's CPU provider casts to float32 for lack of a {dtype} kernel: {', '.join(lacking.silent)}"


def _proof_lines(proofs: list[Proof]) -> Iterator[str]:
    yield f"ONNX Runtime against eager PyTorch, random ids; tolerance {proofs[0].tolerance:.0e} of the largest logit:"
    heads = ("", "B", "T", "err fp64", "err fp32", "largest logit", "top-1 equal")
    rows = [
        (proof.what, proof.B, proof.T, f"{proof.err_fp64:.1e}", f"{proof.err_fp32:.1e}",
         f"{proof.scale:.2f}", f"{proof.top1_match:.1%}")
        for proof in proofs
    ]  # fmt: skip
    alignment = ("left", *["right"] * 6)
    yield indent(tabulate(rows, heads, "plain", colalign=alignment, disable_numparse=True), "  ")
    for proof in proofs:
        if proof.tokens:
            ties = f", {proof.near_ties} others near ties" if proof.near_ties else ""
            yield f"greedy tokens equal to eager's: {proof.tokens_equal} of {proof.tokens}{ties}"


def main() -> None:
    """Parse the command line and export."""
    tyro.cli(export_command, prog="python -m export.onnx")
