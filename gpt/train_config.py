"""Name all that a training run can be told."""

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import tyro

from gpt.cli import UserError
from gpt.config import GPTConfig

# field: the least value allowed; every number must be finite, and every whole one below 2**31 or as MOST says
LEAST = {
    "max_steps": 1,
    "batch_size": 1,
    "eval_interval": 1,
    "eval_batches": 1,
    "save_interval": 0,
    "keep_last": 1,
    "warmup_steps": 0,
    "learning_rate": 0,
    "min_lr": 0,
    "weight_decay": 0,
    "beta2": 0,
    "grad_clip": 0,
    "seed": 0,
}
LEAST_IF_GIVEN = {"micro_batch_size": 1, "decay_steps": 1, "patience": 1, "threads": 1, "minutes": 0}
MOST = {"seed": 2**62 - 1}


@dataclass(frozen=True)
class TrainConfig:
    """One training run. The vocabulary is the corpus's own.

    Raises UserError (a ValueError) that names the field, its value and what is allowed.
    """

    corpus: Path | None = None  # a text file, or a folder of gpt.corpus; by default Python's standard library
    tokenizer: Literal["characters", "gpt2"] | None = None  # by default the folder's, and characters for a text
    order: Literal["random", "sequential", "one"] = "random"  # of blocks; one is the same batch each time
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("artifacts/ckpt.pt")  # the checkpoint to write
    hand_on: Literal["best", "last"] = "best"  # which weights go there: of the least validation loss, or the last
    init_from: str | None = None  # weights to begin with: gpt2 … gpt2-xl, a Hugging Face folder, or a checkpoint
    resume: bool = False  # go on from the last checkpoint beside the output, if there is one
    overwrite: bool = False  # begin again although an unfinished run is there
    allow_changed_corpus: bool = False  # resume although the corpus is not what the run has been trained on so far

    n_layer: int = 4  # depth
    n_head: int = 4  # attention heads a layer
    n_embd: int = 128  # width
    block_size: int = 64  # the longest sequence, in tokens
    dropout: float = 0.0  # probability
    bias: bool = False  # biases in every Linear and LayerNorm
    activation: Literal["gelu_tanh", "gelu", "relu", "quick_gelu", "silu", "tanh"] = "gelu_tanh"  # gelu is exact
    tied_head: bool = True  # the head is the token embedding
    model: Literal["gpt", "bigram"] = "gpt"  # a bigram is a table of vocab_size², with nothing else to choose

    max_steps: int = 1500  # updates
    batch_size: int = 12  # sequences an update, over all ranks and micro-batches
    micro_batch_size: int | None = None  # sequences at a time on a rank; by default its whole share
    learning_rate: float = 1e-3  # at its highest, after the warm-up
    min_lr: float = 1e-4  # from decay_steps on
    warmup_steps: int = 100  # of a rate that rises from 0
    decay_steps: int | None = None  # the rate falls until then; by default max_steps
    weight_decay: float = 0.1  # on matrices only
    beta2: float = 0.99  # AdamW's memory of squared gradients
    grad_clip: float = 1.0  # the gradient's largest norm; 0 leaves it alone
    seed: int = 1337  # of weights, batches and dropout

    eval_interval: int = 250  # updates between two evaluations
    eval_batches: int = 20  # batches an evaluation averages over
    patience: int | None = None  # stop after so many evaluations without a lower validation loss
    minutes: float | None = None  # stop after so many
    save_interval: int = 250  # updates between two checkpoints to resume from; 0 writes the last only
    keep_last: int = 2  # how many of them stay
    tensorboard: bool = True  # log for it too

    device: str = "auto"  # cuda, cuda:1, mps, cpu; auto is the first of them that is here
    threads: int | None = None  # of the CPU; torch's own choice by default
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"  # auto: bf16 on a GPU, fp32 elsewhere
    compile: bool = False  # by torch.compile
    recompute: bool = False  # activations in the backward pass: less memory, a third more work

    def __post_init__(self) -> None:
        for name, least in (LEAST | LEAST_IF_GIVEN).items():
            value = getattr(self, name)
            if value is None and name in LEAST_IF_GIVEN:
                continue
            most = MOST.get(name, sys.float_info.max if isinstance(value, float) else 2**31 - 1)
            if not least <= value <= most:
                raise UserError(f"{name}={value}: must be at least {least} and at most {most}")
        if self.min_lr > self.learning_rate:
            raise UserError(f"min_lr={self.min_lr}: must be at most learning_rate={self.learning_rate}")
        if self.beta2 >= 1:
            raise UserError(f"beta2={self.beta2}: must be below 1")
        if self.minutes == 0:
            raise UserError("minutes=0: must be above 0")
        if self.resume and self.overwrite:
            raise UserError("resume=True: must not come with overwrite=True; choose one of them")
        if self.allow_changed_corpus and not self.resume:
            raise UserError("allow_changed_corpus=True: is of use with resume=True alone; leave it out")
        for each in fields(self):
            if (allowed := _choices(each.type)) and getattr(self, each.name) not in allowed:
                raise UserError(
                    f"{each.name}={getattr(self, each.name)!r}: must be one of {', '.join(map(str, allowed))}"
                )
        self.model_config(vocab_size=1)  # its own checks, before any work

    def model_config(self, vocab_size: int) -> GPTConfig:
        """Return the model's shape: the fields of the same names, and the tokenizer's size."""
        if self.model == "bigram":
            return GPTConfig.bigram(vocab_size, self.block_size)
        shared = {each.name for each in fields(GPTConfig)} & {each.name for each in fields(self)}
        return GPTConfig(vocab_size=vocab_size, **{name: getattr(self, name) for name in shared})

    @property
    def folder(self) -> Path:
        """The folder of the run's checkpoints and logs: `artifacts/ckpt-run` beside `artifacts/ckpt.pt`."""
        return self.output.with_name(f"{self.output.stem}-run")


def _choices(hint: Any) -> tuple[Any, ...]:
    """Return the values that `Literal[…]` or `Literal[…] | None` allows; none of another type."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    if any(get_origin(each) is Literal for each in get_args(hint)):
        return (*_choices(get_args(hint)[0]), None)
    return ()
