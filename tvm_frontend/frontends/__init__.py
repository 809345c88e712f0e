"""The frontends: each is one file here, whose `read` gives a model's description and a function for its graph."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from export.artifact import ExportedModel
from gpt.cli import UserError
from gpt.config import GPTConfig
from tvm_frontend.artifact import RELAY
from tvm_frontend.graph import Graph

DEFAULT: Final = "onnx"
FRONTENDS = {
    "onnx": "this project's importer of ONNX: any B and T",
    "relax-onnx": "TVM's importer of ONNX: one B and T, chosen when compiling",
    "torch": "TVM's importer of torch.export's programs, from a checkpoint: any B and T",
}
_OF_EXPORTED = ("config", "tokenizer", "dtype", "form", "sha256", "checkpoint_sha256")


@dataclass(frozen=True)
class Source:
    """Describes a model that was read, and makes its graph.

    config, tokenizer, dtype, form, checkpoint_sha256: as `export.artifact.ExportedModel` has them. sha256: the
    hash of the file that was read. fixed_shape: the one [B, T] that the graph takes, or None for all. import_graph:
    makes the graph; it raises UserError for a node that it cannot read.
    """

    config: GPTConfig
    tokenizer: dict[str, Any]
    dtype: str
    form: str
    sha256: str
    checkpoint_sha256: str
    import_graph: Callable[[], Graph]
    fixed_shape: tuple[int, int] | None = None

    @classmethod
    def of(cls, exported: ExportedModel, import_graph: Callable[[], Graph], **rest: Any) -> "Source":
        """Make one of an ONNX file of ours; `rest` holds the fields that it lacks, or has with another value."""
        own = {name: getattr(exported, name) for name in _OF_EXPORTED}
        return cls(import_graph=import_graph, **own | rest)


def read_source(frontend: str, model: Path, fixed_shape: tuple[int, int] | None = None) -> Source:
    """Read a model's file by one of the FRONTENDS; raises UserError for another, and for a file that it cannot read."""
    if frontend not in FRONTENDS:
        raise UserError(f"frontend {frontend!r}: must be one of {', '.join((*FRONTENDS, RELAY))}")
    return import_module(f"{__name__}.{frontend.replace('-', '_')}").read(model, fixed_shape)


def refuse_fixed_shape(frontend: str, fixed_shape: tuple[int, int] | None) -> None:
    """Raise UserError where one shape is asked of a frontend that takes all."""
    if fixed_shape is not None:
        raise UserError(f"--batch and --tokens: not with --frontend {frontend}, which serves every B and T; drop them")
