"""The chain ckpt.pt, model.onnx, tvm-llvm-O0 and -O3 of a folder: what is there is verified, what is absent made."""

import sys
from collections.abc import Iterable
from pathlib import Path

from bench.artifacts import Artifacts
from bench.backends import Contender
from gpt.cli import UserError
from gpt.config import GPTConfig
from gpt.files import sha256_file

# Models with random weights, for comparing without a training run. `demo` is what `make demo` trains, `gpt2` is
# GPT-2 124M's shape, `tiny` is for tests, `bigram` has no arithmetic at all.
SEEDED = {
    "bigram": GPTConfig.bigram(vocab_size=98, block_size=64),
    "demo": GPTConfig(block_size=64, vocab_size=98, n_layer=4, n_head=4, n_embd=128, bias=False),
    "gpt2": GPTConfig(),
    "tiny": GPTConfig(block_size=16, vocab_size=31, n_layer=2, n_head=2, n_embd=32),
}
STAGES = ("checkpoint", "exported", "compiled")


def choose_artifacts(folder: Path, seeded: str | None) -> tuple[Artifacts, str]:
    """The artifacts to work on and, in words, whose model they hold; nothing is read or made yet.

    The folder's own model, unless a seeded one is asked for or there is none: that lives in a folder of its own,
    so it never takes a trained model's place. Raises UserError for an unknown seeded model.
    """
    if seeded is not None and seeded not in SEEDED:
        raise UserError(f"seeded {seeded!r}: not known; known are {', '.join(SEEDED)}")
    own = Artifacts(folder)
    if seeded is None and own.checkpoint.exists():
        return own, f"the model in {own.checkpoint}"
    if seeded is None and own.exported.exists():
        raise UserError(
            f"{own.exported} is there, but not {own.checkpoint} that it came from: bring the checkpoint back, "
            f"or remove {own.exported}, or say --seeded demo"
        )
    name = seeded or "demo"
    nothing = "" if seeded else f"no {own.checkpoint}, so "
    return Artifacts(folder / f"seeded-{name}"), f"{nothing}the seeded model {name!r} (random weights)"


def prepare(artifacts: Artifacts, contenders: Iterable[Contender]) -> GPTConfig:
    """Make or verify all that the contenders present here need, and return the model's config.

    Raises UserError where a file does not come from the one before it, naming both and the command that remakes it.
    """
    needed = {contender.stage for contender in contenders if not contender.missing}
    last = max((STAGES.index(stage) for stage in needed), default=0)
    config = _prepare_checkpoint(artifacts)
    if last >= STAGES.index("exported"):
        _prepare_exported(artifacts)
    if last >= STAGES.index("compiled"):
        for level in (0, 3):
            _prepare_compiled(artifacts, level)
    return config


def config_of(artifacts: Artifacts) -> GPTConfig:
    """The shape of a folder's model, also of a seeded one that is not made yet."""
    if artifacts.checkpoint.exists():
        from gpt.checkpoint import load_checkpoint

        return load_checkpoint(artifacts.checkpoint).config
    return SEEDED[artifacts.folder.name.removeprefix("seeded-")]


def _prepare_checkpoint(artifacts: Artifacts) -> GPTConfig:
    config = config_of(artifacts)
    if not artifacts.checkpoint.exists():
        from gpt.checkpoint import save_checkpoint, seeded_checkpoint

        _say(f"making a model with random weights (seed 0): {artifacts.checkpoint}")
        save_checkpoint(artifacts.checkpoint, seeded_checkpoint(config, seed=0))
    return config


def _prepare_exported(artifacts: Artifacts) -> None:
    checkpoint, exported = artifacts.checkpoint, artifacts.exported
    if not exported.exists():
        from export.onnx import export_onnx

        _say(f"exporting {checkpoint} to {exported}")
        export_onnx(checkpoint, exported)
        return
    from export.artifact import load_exported

    if load_exported(exported).checkpoint_sha256 != sha256_file(checkpoint):
        raise UserError(
            f"{exported} was not exported from {checkpoint}: remake it with "
            f"python -m export.onnx {checkpoint} -o {exported}"
        )


def _prepare_compiled(artifacts: Artifacts, level: int) -> None:
    exported, compiled = artifacts.exported, artifacts.compiled(f"O{level}")
    if not compiled.exists():
        from tvm_frontend.compile import compile_model

        _say(f"compiling {exported} to {compiled}")
        compile_model(exported, compiled, opt_level=level)
        return
    from tvm_frontend.artifact import load_compiled

    if load_compiled(compiled).exported_sha256 != sha256_file(exported):
        raise UserError(
            f"{compiled} was not compiled from {exported}: remake it with "
            f"python -m tvm_frontend.compile {exported} -o {compiled} --opt-level {level}"
        )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
