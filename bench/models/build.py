"""The files that a folder's model is made into, from ckpt.pt on: what is there is verified, what is absent made."""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from bench.backends import Contender
from bench.harness.memory import give_memory_back
from bench.harness.work import phases_of
from bench.models.artifacts import (
    CACHED,
    CACHED_INT8,
    CHECKPOINT,
    COMPILED_CACHED,
    COMPILED_LOW,
    COMPILED_O0,
    COMPILED_O3,
    COMPILED_RELAY,
    CTRANSLATE2,
    DEVICE_CACHED,
    DEVICE_COMPILED,
    DEVICE_LAST,
    DEVICE_RELAY,
    EXPORTED,
    EXPORTED_INT8,
    OPENVINO,
    OPENVINO_PAST,
    PAST,
    Artifacts,
)
from bench.models.external import adopt_foreign, is_foreign
from gpt.cli import UserError
from gpt.config import GPTConfig
from gpt.files import find_input, sha256_file
from gpt.presets import PRESETS
from tvm_frontend.target import CUDA_ARCHS


def _preset(name: str, vocab_size: int) -> GPTConfig:
    """Return the shape that a preset trains, without dropout, which only training has."""
    return replace(PRESETS[name][1], dropout=0.0).model_config(vocab_size)


# Models with random weights, to compare engines without a training run. `demo` is what `make demo` trains and `char`
# the preset of that name; `gpt2`, `gpt2-medium` and `gpt2-large` have 124, 355 and 774 million parameters. `tiny` is
# for tests, and `bigram` multiplies nothing.
SEEDED = {
    "bigram": GPTConfig.bigram(vocab_size=98, block_size=64),
    "char": _preset("char", vocab_size=65),
    "demo": _preset("demo", vocab_size=98),
    "gpt2": _preset("gpt2-124m", GPTConfig().vocab_size),
    "gpt2-medium": _preset("gpt2-medium", GPTConfig().vocab_size),
    "gpt2-large": _preset("gpt2-large", GPTConfig().vocab_size),
    "tiny": GPTConfig(block_size=16, vocab_size=31, n_layer=2, n_head=2, n_embd=32),
}

LOW_PRECISIONS = ("bf16", "int8", "int4")


class CannotMake(UserError):
    """A file cannot be made of this model here; what needs it is absent."""


@dataclass(frozen=True)
class Making:
    """How a file is made. source: what from. make: given both paths. origin: the SHA-256 of its source that it names.

    done: what was done to the source. command: the same by hand, with the paths' names in braces. static: in a
    folder of that name, a file for each shape, as `1x64`.
    """

    source: str
    make: Callable[[Path, Path], object]
    origin: Callable[[Path], str]
    done: str
    command: str
    static: bool = False


def choose_artifacts(folder: Path, seeded: str | None, onnx: Path | None = None) -> tuple[Artifacts, str]:
    """The artifacts to work on and, in words, whose model they hold; nothing is read or made yet.

    The folder's own model, unless a seeded one is asked for or there is none: that lives in a folder of its own,
    so it never takes a trained model's place. onnx: a file that somebody else wrote, also in a folder of its own; that
    is read, as it says what the model is. Raises UserError for an unknown seeded model and an unusable file.
    """
    if onnx is not None:
        if seeded is not None:
            raise UserError(f"seeded {seeded!r} and {onnx}: which of the two models is it to be? Leave one out")
        return adopt_foreign(find_input(onnx), folder)
    if seeded is not None and seeded not in SEEDED:
        raise UserError(f"seeded {seeded!r}: not known; known are {', '.join(SEEDED)}")
    own = Artifacts(folder)
    if seeded is None and own.checkpoint.exists():
        return own, f"the model in {own.checkpoint}"
    if seeded is None and own.exported.exists():
        raise UserError(
            f"{own.exported} is there, but not {own.checkpoint} that it came from: copy the checkpoint there, "
            f"or remove {own.exported}, or say --seeded demo"
        )
    name = seeded or "demo"
    nothing = "" if seeded else f"no {own.checkpoint}, so "
    return Artifacts(folder / f"seeded-{name}"), f"{nothing}the seeded model {name!r} (random weights)"


def prepare(
    artifacts: Artifacts,
    contenders: Iterable[Contender],
    phases: Iterable[str] | None = None,
    prompts: Iterable[tuple[int, int]] = (),
) -> GPTConfig:
    """Make or verify all that the contenders present here need for some phases, and return the model's config.

    phases: by default all that the model has. prompts: the shapes that static engines need files for. Raises UserError
    where a file does not come from the one before it, naming both and the command that remakes it, and CannotMake where
    one cannot be made.
    """
    config = config_of(artifacts) if is_foreign(artifacts) else _prepare_checkpoint(artifacts)
    asked = phases_of(config) if phases is None else tuple(phases)
    needed = {file for each in contenders if not each.absent for phase, file in each.files if phase in asked}
    needed |= {MAKINGS[file].source for file in needed if file in MAKINGS}
    for name, making in MAKINGS.items():
        if name in needed and not (making.source == CHECKPOINT and is_foreign(artifacts)):
            path = artifacts.folder / name
            for each in [path / f"{B}x{T}" for B, T in dict.fromkeys(prompts)] if making.static else [path]:
                _prepare_made(artifacts.folder / making.source, each, making)
    return config


def config_of(artifacts: Artifacts) -> GPTConfig:
    """The shape of a folder's model, also of a seeded one that is not made yet."""
    if is_foreign(artifacts):
        from export.artifact import load_exported

        return load_exported(artifacts.exported).config
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


def _prepare_made(source: Path, path: Path, making: Making) -> None:
    if not path.exists():
        _say(f"{source} is {making.done} to {path}")
        try:
            making.make(source, path)
        except UserError as error:
            raise CannotMake(str(error)) from error
        finally:
            give_memory_back()  # of all the files of a GPT-2 6 GB, which the engines then lack
    elif making.origin(path) != sha256_file(source):
        shape = dict(zip("BT", path.name.split("x"), strict=True)) if making.static else {}
        command = making.command.format(source=source, path=path, **shape)
        raise UserError(f"{path} was not {making.done} from {source}: remake it with {command}")


def _exported(form: str, options: str = "", **how: object) -> Making:
    def make(source: Path, path: Path) -> None:
        from export.onnx import export_onnx

        export_onnx(source, path, form=form, **how)

    def origin(path: Path) -> str:
        from export.artifact import load_exported

        return load_exported(path).checkpoint_sha256

    return Making(CHECKPOINT, make, origin, "exported", f"python -m export.onnx {{source}} -o {{path}}{options}")


def _compiled(source: str, level: int, precision: str = "fp32", arch: str | None = None) -> Making:
    def make(source: Path, path: Path) -> None:
        from tvm_frontend.compile import compile_model

        target = "cuda" if arch else "llvm"
        compile_model(source, path, target=target, arch=arch, opt_level=level, precision=precision)

    def origin(path: Path) -> str:
        from tvm_frontend.artifact import load_compiled

        return load_compiled(path).exported_sha256

    command = f"python -m tvm_frontend.compile {{source}} -o {{path}} --opt-level {level}"
    command += f" --target cuda --arch {arch}" if arch else ""
    command += "" if precision == "fp32" else f" --precision {precision}"
    return Making(source, make, origin, "compiled", command)


def _compiled_by_relay(source: str, level: int, arch: str | None = None) -> Making:
    def make(source: Path, path: Path) -> None:
        from tvm_frontend.compile import compile_model

        B, T = map(int, path.name.split("x"))
        target = "cuda" if arch else "llvm"
        compile_model(source, path, target=target, arch=arch, opt_level=level, frontend="relay", fixed_shape=(B, T))

    def origin(path: Path) -> str:
        from tvm_frontend.artifact import load_compiled

        return load_compiled(path).exported_sha256

    options = f"--frontend relay --opt-level {level} --batch {{B}} --tokens {{T}}"
    options += f" --target cuda --arch {arch}" if arch else ""
    command = f"python -m tvm_frontend.compile {{source}} -o {{path}} {options}"
    return Making(source, make, origin, "compiled", command, static=True)


def _quantized(source: str, tool: str, bits: int) -> Making:
    def make(source: Path, path: Path) -> None:
        from export.quantize import quantize_onnxruntime, quantize_openvino

        quantize_onnxruntime(source, path) if tool == "onnxruntime" else quantize_openvino(source, path, bits)

    def origin(path: Path) -> str:
        from export.quantize import origin_of

        return origin_of(path)

    command = f"python -m export.quantize {{source}} -o {{path}} --tool {tool} --bits {bits}"
    return Making(source, make, origin, "quantised", command)


def _converted() -> Making:
    def make(source: Path, path: Path) -> None:
        from export.ctranslate2 import convert_ctranslate2

        convert_ctranslate2(source, path)

    def origin(path: Path) -> str:
        from export.ctranslate2 import origin_of

        return origin_of(path)

    return Making(CHECKPOINT, make, origin, "converted", "python -m export.ctranslate2 {source} -o {path}")


# In an order in which each comes after its source.
MAKINGS = {
    EXPORTED: _exported("forward"),
    CACHED: _exported("cached", " --cache static"),
    PAST: _exported("past", " --cache past"),
    COMPILED_O0: _compiled(EXPORTED, 0),
    COMPILED_O3: _compiled(EXPORTED, 3),
    COMPILED_CACHED: _compiled(CACHED, 3),
    **{COMPILED_RELAY.format(level): _compiled_by_relay(EXPORTED, level) for level in (0, 3)},
    **{COMPILED_LOW[0].format(precision): _compiled(EXPORTED, 3, precision) for precision in LOW_PRECISIONS},
    **{COMPILED_LOW[1].format(precision): _compiled(CACHED, 3, precision) for precision in LOW_PRECISIONS},
    CTRANSLATE2: _converted(),
    EXPORTED_INT8: _quantized(EXPORTED, "onnxruntime", 8),
    CACHED_INT8: _quantized(CACHED, "onnxruntime", 8),
    **{OPENVINO.format(bits): _quantized(EXPORTED, "openvino", bits) for bits in (8, 4)},
    **{OPENVINO_PAST.format(bits): _quantized(PAST, "openvino", bits) for bits in (8, 4)},
    DEVICE_CACHED.format(""): _exported("cached", " --cache static", proof=False),
    DEVICE_LAST: _exported("forward", " --last", last=True, proof=False),
    **{DEVICE_RELAY.format(arch or "llvm"): _compiled_by_relay(DEVICE_LAST, 3, arch) for arch in (None, *CUDA_ARCHS)},
    **{
        DEVICE_CACHED.format(f"-{precision}"): _exported(
            "cached", f" --cache static --last --precision {precision}", precision=precision, last=True, proof=False
        )
        for precision in ("bf16", "fp16")
    },
    **{
        name.format(arch or "llvm"): _compiled(DEVICE_CACHED.format(""), level, precision, arch)
        for arch in (None, *CUDA_ARCHS)
        for name, level, precision in zip(DEVICE_COMPILED, (0, 3), ("fp32", "bf16"), strict=True)
    },
}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
