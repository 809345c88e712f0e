"""Reads checkpoints by torch.export and TVM's importer of its programs. The package's one file that needs torch."""

from pathlib import Path

import numpy as np
import torch
from tvm.relax.frontend.torch import from_exported_program

from gpt.checkpoint import Checkpoint, load_checkpoint
from gpt.cli import UserError
from tvm_frontend.frontends import Source, refuse_fixed_shape
from tvm_frontend.frontends.upstream import graph_of, node_at, reason_of
from tvm_frontend.graph import Graph


def read(model: Path, fixed_shape: tuple[int, int] | None) -> Source:
    """Read a checkpoint. Raises UserError for another file."""
    refuse_fixed_shape("torch", fixed_shape)
    if model.suffix == ".onnx":
        raise UserError(f"{model}: --frontend torch reads a checkpoint, as artifacts/ckpt.pt")
    checkpoint = load_checkpoint(model)
    assert checkpoint.sha256 is not None  # it was read from a file
    return Source(
        config=checkpoint.config,
        tokenizer=checkpoint.tokenizer,
        dtype="float32",
        form="forward",
        sha256=checkpoint.sha256,
        checkpoint_sha256=checkpoint.sha256,
        import_graph=lambda: import_program(export_program(checkpoint)),
        run=lambda ids: run_checkpoint(checkpoint, ids),
        run_dtype="float32",
    )


def run_checkpoint(checkpoint: Checkpoint, ids: np.ndarray) -> np.ndarray:
    """Compute logits float32 [B, T, V] of ids int64 [B, T] by PyTorch."""
    with torch.inference_mode():
        return checkpoint.build("explicit")(torch.from_numpy(ids)).numpy()


def export_program(checkpoint: Checkpoint) -> torch.export.ExportedProgram:
    """Trace the model by torch.export, ids int64 [B, T] to logits float32 [B, T, V]."""
    block_size = checkpoint.config.block_size
    T = min(block_size, 8)  # any length but 1, which torch takes for a constant
    dims = {0: torch.export.Dim("B", min=1)} | ({1: torch.export.Dim("T", min=1, max=block_size)} if T > 1 else {})
    ids = torch.zeros(2, T, dtype=torch.int64)
    return torch.export.export(checkpoint.build("sdpa"), (ids,), dynamic_shapes=(dims,))


def import_program(program: torch.export.ExportedProgram) -> Graph:
    """Import the graph by TVM; raises UserError naming the node that it cannot read.

    Attention is kept whole: the mask that torch spells it out with is one that TVM cannot lower.
    """
    try:
        return graph_of(from_exported_program(program, run_ep_decomposition=False, unwrap_unit_return_tuple=True))
    except Exception as error:  # of any type, as KeyError
        if (node := node_at(error, torch.fx.Node)) is None:
            raise
        raise UserError(f"TVM's importer cannot read node {node.name!r} ({node.target}): {reason_of(error)}") from error
