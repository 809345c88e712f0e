"""python -m gpt.train
python -m gpt.train demo --max-steps 500 --n-layer 2
python -m gpt.train shakespeare-char --corpus input.txt --minutes 30 -o artifacts/shakespeare.pt

Train a character-level GPT on one device and write a checkpoint.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from gpt.checkpoint import Checkpoint, save_checkpoint, state_of
from gpt.cli import UserError, run_command
from gpt.config import GPTConfig
from gpt.corpus import load_corpus, random_batches, split
from gpt.files import check_output
from gpt.generate import generate
from gpt.model import GPT, loss_of
from gpt.tokenizer import CharTokenizer
from gpt.zoo import build_model

Draw = Callable[[], tuple[Tensor, Tensor]]

# field: the least value allowed
LEAST = {
    "max_steps": 1,
    "batch_size": 1,
    "eval_interval": 1,
    "eval_batches": 1,
    "warmup_steps": 0,
    "learning_rate": 0,
    "min_lr": 0,
    "weight_decay": 0,
    "beta2": 0,
    "grad_clip": 0,
    "seed": 0,
}


@dataclass(frozen=True)
class TrainConfig:
    """One training run. The vocabulary is the corpus's own characters.

    Raises UserError (a ValueError) that names the field, its value and what is allowed.
    """

    corpus: Path | None = None  # a text file; by default the source of this Python's standard library
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("artifacts/ckpt.pt")  # the checkpoint to write

    n_layer: int = 4  # depth
    n_head: int = 4  # attention heads a layer
    n_embd: int = 128  # width
    block_size: int = 64  # the longest sequence, in tokens
    dropout: float = 0.0  # probability
    bias: bool = False  # biases in every Linear and LayerNorm
    activation: Literal["gelu_tanh", "gelu", "relu"] = "gelu_tanh"  # GPT-2's approximation, exact, or the lecture's
    tied_head: bool = True  # the head is the token embedding
    model: Literal["gpt", "bigram"] = "gpt"  # a bigram is a table of vocab_size², with nothing else to choose

    max_steps: int = 1500  # updates; the learning rate falls towards the last
    batch_size: int = 12  # sequences an update
    learning_rate: float = 1e-3  # at its highest, after the warm-up
    min_lr: float = 1e-4  # at the last update
    warmup_steps: int = 100  # of a rate that rises from 0
    weight_decay: float = 0.1  # on matrices only
    beta2: float = 0.99  # AdamW's memory of squared gradients
    grad_clip: float = 1.0  # the gradient's largest norm; 0 leaves it alone
    eval_interval: int = 250  # updates between two evaluations
    eval_batches: int = 20  # batches an evaluation averages over
    seed: int = 1337  # of weights, batches and dropout
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto is a GPU if there is one
    threads: int | None = None  # of the CPU; torch's own choice by default
    minutes: float | None = None  # stop early after so many minutes of training

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            if not getattr(self, name) >= least:
                raise UserError(f"{name}={getattr(self, name)}: must be at least {least}")
        if self.min_lr > self.learning_rate:
            raise UserError(f"min_lr={self.min_lr}: must be at most learning_rate={self.learning_rate}")
        if self.beta2 >= 1:
            raise UserError(f"beta2={self.beta2}: must be below 1")
        if self.threads is not None and self.threads < 1:
            raise UserError(f"threads={self.threads}: must be at least 1")
        if self.seed >= 2**62:
            raise UserError(f"seed={self.seed}: must be below 2**62")
        if self.minutes is not None and not self.minutes > 0:
            raise UserError(f"minutes={self.minutes}: must be above 0")
        self.model_config(vocab_size=1)  # its own checks, before any work

    def model_config(self, vocab_size: int) -> GPTConfig:
        """The model's shape: the fields of the same names, and the tokenizer's size."""
        if self.model == "bigram":
            return GPTConfig.bigram(vocab_size, self.block_size)
        shared = {each.name for each in fields(GPTConfig)} - {"vocab_size"}
        return GPTConfig(vocab_size=vocab_size, **{name: getattr(self, name) for name in shared})


# demo and shakespeare-char are nanoGPT's CPU and GPU recipes (its README and config/train_shakespeare_char.py);
# demo has fewer steps (nanoGPT: 2000), to end within a minute on two cores
PRESETS = {
    "demo": ("a small model in about a minute on two cores", TrainConfig()),
    "tiny": (
        "a toy in seconds, to see that everything works",
        TrainConfig(
            n_layer=2,
            n_head=2,
            n_embd=32,
            block_size=32,
            max_steps=100,
            warmup_steps=10,
            eval_interval=50,
            eval_batches=5,
        ),
    ),
    "shakespeare-char": (
        "10.7 million parameters; minutes on a GPU",
        TrainConfig(
            n_layer=6,
            n_head=6,
            n_embd=384,
            block_size=256,
            dropout=0.2,
            max_steps=5000,
            batch_size=64,
        ),
    ),
}


def train(config: TrainConfig) -> Checkpoint:
    """Train a model and return it, printing losses as it goes; the file is the caller's business.

    Raises UserError for a corpus that cannot be used, a device that is not there, or a loss that is no longer a number.
    """
    device = _device_of(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    corpus = load_corpus(config.corpus)
    tokenizer = CharTokenizer.of_text(corpus.text)
    parts = split(tokenizer.encode(corpus.text), config.block_size, corpus.name)
    model = build_model(config.model_config(tokenizer.vocab_size), attention="sdpa").to(device)
    print(
        f"corpus: {corpus.name}, {len(corpus.text):,} characters, {tokenizer.vocab_size} different"
        + (f"; {corpus.dropped:,} others than ASCII left out" if corpus.dropped else "")
        + f"\nmodel: {model.parameter_count():,} parameters, on {device}"
    )
    step, losses = _fit(model, parts, config, device)
    return Checkpoint(model.config, state_of(model), step, tokenizer.to_json(), losses)


def sample(checkpoint: Checkpoint, tokens: int, seed: int) -> str:
    """A text by the model from a line's start on."""
    tokenizer = CharTokenizer(checkpoint.tokenizer["characters"])
    start = "\n" if "\n" in tokenizer.characters else tokenizer.characters[0]
    ids = generate(checkpoint.build("sdpa"), tokenizer.encode(start), tokens, temperature=0.8, seed=seed)
    return tokenizer.decode(ids)


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Rises from 0 through the warm-up, then falls by half a cosine to min_lr (https://arxiv.org/abs/1608.03983)."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (config.learning_rate - config.min_lr)


def _fit(
    model: GPT, parts: tuple[Tensor, Tensor], config: TrainConfig, device: torch.device
) -> tuple[int, dict[str, list[float]]]:
    """Update the model in place; the updates made and the losses on the way."""
    draw = random_batches(parts[0], config.block_size, config.batch_size, config.seed, device)
    optimizer = _optimizer_of(model, config)
    losses: dict[str, list[float]] = {"step": [], "train": [], "val": []}
    started_s, limit_s = time.monotonic(), math.inf if config.minutes is None else 60 * config.minutes
    step = 0
    with tqdm(total=config.max_steps, unit="step", desc="train") as bar:
        while True:
            last = step == config.max_steps or time.monotonic() - started_s > limit_s
            if last or step % config.eval_interval == 0:
                _evaluate(model, parts, config, device, step, losses)
            if last:
                return step, losses
            _update(model, optimizer, draw, learning_rate_at(step, config), config.grad_clip)
            step += 1
            bar.update()


def _update(model: GPT, optimizer: torch.optim.Optimizer, draw: Draw, learning_rate: float, grad_clip: float) -> None:
    inputs, targets = draw()
    with _autocast(inputs.device):
        loss = loss_of(model(inputs), targets)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if grad_clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()


def _evaluate(
    model: GPT,
    parts: tuple[Tensor, Tensor],
    config: TrainConfig,
    device: torch.device,
    step: int,
    losses: dict[str, list[float]],
) -> None:
    """Append the loss on both parts and print it. The batches are the same each time, so two evaluations compare."""
    model.eval()
    losses["step"].append(step)
    for name, ids in zip(("train", "val"), parts, strict=True):
        draw = random_batches(ids, config.block_size, config.batch_size, config.seed + 1, device)
        with torch.inference_mode(), _autocast(device):
            total = sum(
                loss_of(model(inputs), targets) for inputs, targets in (draw() for _ in range(config.eval_batches))
            )
        losses[name].append(float(total) / config.eval_batches)
    model.train()
    tqdm.write(f"step {step:5d}: train loss {losses['train'][-1]:.4f}, val loss {losses['val'][-1]:.4f}")
    if not math.isfinite(losses["train"][-1]):
        raise UserError(f"the loss is {losses['train'][-1]} at step {step}: training diverged; lower --learning-rate")


def _optimizer_of(model: GPT, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (https://arxiv.org/abs/1711.05101) whose decay spares gains and biases."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, config.beta2), fused=True)


def _autocast(device: torch.device) -> torch.autocast:
    """bf16 where it is fast; float32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def _device_of(config: TrainConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA GPU here; use --device cpu")
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)


def parse(arguments: list[str] | None = None) -> TrainConfig:
    """The run that a command line asks for: a preset's name, `demo` by default, then overrides of its fields."""
    presets = tyro.extras.subcommand_type_from_defaults(
        defaults={name: config for name, (_, config) in PRESETS.items()},
        descriptions={name: description for name, (description, _) in PRESETS.items()},
    )
    return tyro.cli(
        presets,
        prog="python -m gpt.train",
        args=arguments,
        default=PRESETS["demo"][1],
        description="Train a character-level GPT on one device and write a checkpoint. "
        "A preset comes first, then what to change in it; PRESET --help shows its values.",
        config=(tyro.conf.CascadeSubcommandArgs,),
    )


def main() -> None:
    """Parse the command line, train, print a sample and write the checkpoint."""
    config = parse()
    check_output(config.output)
    checkpoint = train(config)
    save_checkpoint(config.output, checkpoint)
    print(f"\nsample:\n{sample(checkpoint, tokens=400, seed=config.seed)}\n")
    print(f"checkpoint: {config.output}")


if __name__ == "__main__":
    run_command(main)
