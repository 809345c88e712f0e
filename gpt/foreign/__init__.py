"""Models that others saved, recognised by what is in their files; nothing of them is run.

Every module here returns a `ForeignModel`, of which `gpt.checkpoint.load_checkpoint` makes a Checkpoint.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gpt.cli import UserError
from gpt.config import ACTIVATIONS, GPTConfig


@dataclass(frozen=True)
class ForeignModel:
    """A model of somebody else's file, in this project's terms.

    kind: whose file it is, in words. config, state: as `Checkpoint` has them, the state in float32. step: updates it
    was trained for, 0 where the file does not say. tokenizer: as `gpt.tokenizer` spells it in JSON.
    """

    kind: str
    config: GPTConfig
    state: dict[str, Tensor]
    tokenizer: dict[str, Any]
    step: int = 0


@dataclass(frozen=True)
class Hints:
    """What the user says of a file that does not say it: `heads` and `activation`, None where nothing was said.

    They also replace what was recognised. Raises UserError for an activation that is not known.
    """

    heads: int | None = None
    activation: str | None = None

    def __post_init__(self) -> None:
        if self.activation is not None and self.activation not in ACTIVATIONS:
            raise UserError(f"activation={self.activation!r}: must be one of {', '.join(ACTIVATIONS)}")

    def complete(self, path: Path, heads: int | None, activation: str | None) -> tuple[int, str]:
        """Return the number of heads and the activation, by these hints or else by what a file says.

        Raises UserError that gives the command line to say them with, where neither does.
        """
        heads = self.heads if self.heads is not None else heads
        activation = self.activation or activation
        if heads is None or activation is None:
            missing = {"heads": heads, "activation": activation}
            unknown = " and ".join(name for name, value in missing.items() if value is None)
            raise UserError(
                f"{path}: a GPT-2's weights, and the file does not say its {unknown}; make a checkpoint of it with: "
                f"python -m gpt.pretrained {path} --heads {heads or 'N'} --activation {activation or 'gelu_tanh'} "
                "-o artifacts/ckpt.pt" + ("" if activation else f" (activations: {', '.join(ACTIVATIONS)})")
            )
        return heads, activation


NO_HINTS = Hints()
