"""Builds the files that engines need from a folder's model, each from the file before it, beginning with ckpt.pt.

A file that exists is verified against its source; one that is absent is built. A file that is damaged, or that was not
made from the source that is there, makes stale what was made of it: `prepare` names all of them, `remake_stale` makes
them again.
"""

import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from bench.backends import Candidate
from bench.harness.memory import give_memory_back
from bench.harness.work import phases_of
from bench.harness.worker import MOST_CHARACTERS
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
from bench.models.external import open_external, read_external
from bench.models.shape import Model
from gpt.cli import UserError
from gpt.config import GPTConfig
from gpt.files import ARTIFACTS, find_input, sha256_file
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
    "tiny": GPTConfig(block_size=70, vocab_size=31, n_layer=2, n_head=2, n_embd=32),
}

LOW_PRECISIONS = ("bf16", "int8", "int4")


class CannotMake(UserError):
    """A file cannot be built from this model on this machine, so engines that need it are absent."""


@dataclass(frozen=True)
class BuildRule:
    """Builds one file from another.

    source: the name of the file to build from. make(source, path): builds it. origin(path): the SHA-256 of the source
    that the built file records. done: a past participle for messages, such as `exported`. command: the shell command
    that does the same, with {source} and {path}. static: True if the path is a folder with one file per shape, such as
    `1x64`.
    """

    source: str
    make: Callable[[Path, Path], object]
    origin: Callable[[Path], str]
    done: str
    command: str
    static: bool = False

    def made(self, path: Path) -> list[Path]:
        """List what was built under a name: the path itself, or its subfolders with a shape each."""
        return sorted(path.glob("*x*")) if self.static else [path] if path.exists() else []

    def is_of(self, path: Path, sha256: str) -> bool:
        """Return whether a file is whole and was built from a source of that hash."""
        try:
            return self.origin(path) == sha256
        except UserError:
            return False


def choose_artifacts(folder: Path, seeded: str | None, onnx: Path | None = None) -> tuple[Artifacts, str]:
    """Choose the model to work on: return its artifacts and a description of it, before anything is built.

    This is the folder's own model, unless a seeded one is asked for or the folder has none. A seeded model has its own
    subfolder, so it never replaces a trained one. onnx: an external ONNX file, which is read at once and stays as it
    is; what is made of it gets a subfolder. Raises UserError for an unknown seeded model and an unusable file.
    """
    if onnx is not None:
        if seeded is not None:
            raise UserError(f"seeded {seeded!r} and {onnx}: which of the two models is it to be? Leave one out")
        return open_external(find_input(onnx), folder)
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
    candidates: Iterable[Candidate],
    phases: Iterable[str] | None = None,
    prompts: Iterable[tuple[int, int]] = (),
) -> Model:
    """Build or verify all files that installed candidates need for some phases, and return the model's sizes.

    phases: by default all of the model's. prompts: the (B, T) shapes for which static engines need files. Raises
    UserError if a file was not built from the source that is there, naming both, all that is stale with it and the
    command that rebuilds them, and CannotMake if one cannot be built.
    """
    config = config_of(artifacts) if artifacts.onnx else _prepare_checkpoint(artifacts)
    asked = phases_of(config) if phases is None else tuple(phases)
    files = {file for each in candidates if not each.absent for phase, file in each.files if phase in asked}
    files |= {BUILD_RULES[file].source for file in files if file in BUILD_RULES}
    needed = set(map(artifacts.name_of, files))
    for name, rule in BUILD_RULES.items():
        if name in needed and not (rule.source == CHECKPOINT and artifacts.onnx):
            path = artifacts.path(name)
            for each in [path / f"{B}x{T}" for B, T in dict.fromkeys(prompts)] if rule.static else [path]:
                _prepare_made(artifacts, each, rule)
    return config


def config_of(artifacts: Artifacts) -> Model:
    """Return the sizes of a folder's model, also of a seeded one that is not built yet."""
    if artifacts.onnx is not None:
        return read_external(artifacts.onnx).shape
    if artifacts.checkpoint.exists():
        from gpt.checkpoint import load_checkpoint

        return load_checkpoint(artifacts.checkpoint).config
    return _seeded_config(artifacts)


def _prepare_checkpoint(artifacts: Artifacts) -> Model:
    if not artifacts.checkpoint.exists():
        from gpt.checkpoint import save_checkpoint, seeded_checkpoint

        _say(f"making a model with random weights (seed 0): {artifacts.checkpoint}")
        save_checkpoint(artifacts.checkpoint, seeded_checkpoint(_seeded_config(artifacts), seed=0))
    return config_of(artifacts)


def _seeded_config(artifacts: Artifacts) -> GPTConfig:
    return SEEDED[artifacts.folder.name.removeprefix("seeded-")]


def _make(artifacts: Artifacts, source: Path, path: Path, rule: BuildRule) -> None:
    _say(f"{source} is {rule.done} to {path}")
    try:
        rule.make(source, path)
    except UserError as error:
        raise CannotMake(str(error)) from error
    except Exception as error:
        if artifacts.onnx is None:
            raise
        # What a tool has not foreseen in somebody's file is no reason for others not to run it.
        line = next(filter(None, map(str.strip, str(error).splitlines())), "")
        raise CannotMake(f"{type(error).__name__}: {line[:MOST_CHARACTERS]}") from error
    finally:
        give_memory_back()  # building all files of a GPT-2 leaves 6 GB, which the engines would lack


def _prepare_made(artifacts: Artifacts, path: Path, rule: BuildRule) -> None:
    source = artifacts.path(rule.source)
    if not path.exists():
        _make(artifacts, source, path, rule)
    elif rule.origin(path) != _sha256_of(artifacts, source):
        others = [each for each, *_ in _stale(artifacts) if each != path]
        shape = dict(zip("BT", path.name.split("x"), strict=True)) if rule.static else {}
        command = rule.command.format(source=source, path=path, **shape)
        if not others:
            raise UserError(f"{path} was not {rule.done} from {source}: remake it with {command}")
        names = ", ".join(str(each.relative_to(artifacts.folder)) for each in others)
        raise UserError(
            f"{path} was not {rule.done} from {source}, and with it are stale: {names}; "
            f"remake them all with {_remake_command(artifacts)}"
        )


def _sha256_of(artifacts: Artifacts, source: Path) -> str:
    return read_external(source).sha256 if source == artifacts.onnx else sha256_file(source)


def remake_stale(artifacts: Artifacts) -> list[Path]:
    """Make again, each from the file before it, all files that are damaged or not of the model that is there.

    Returns them. Raises UserError for one that cannot be made.
    """
    if not (artifacts.checkpoint.exists() or artifacts.onnx):
        return []
    found = list(_stale(artifacts))
    for path, source, rule in found:
        if not source.exists():  # what it was made from is no file of this folder any more
            raise UserError(f"{path} is stale, and {source} that it was made from is gone: remove {path}")
        _make(artifacts, source, path, rule)
    return [path for path, *_ in found]


def _stale(artifacts: Artifacts) -> Iterator[tuple[Path, Path, BuildRule]]:
    """Yield the files that are damaged or not built from what is there, each after those that it is built from."""
    stale = set()
    for name, rule in BUILD_RULES.items():
        source = artifacts.path(rule.source)
        if artifacts.onnx and (rule.source == CHECKPOINT or artifacts.name_of(name) != name):
            continue
        for path in rule.made(artifacts.folder / name):
            if source in stale or (source.exists() and not rule.is_of(path, _sha256_of(artifacts, source))):
                stale.add(path)
                yield path, source, rule


def _remake_command(artifacts: Artifacts) -> str:
    folder, words = artifacts.folder, ["python", "-m", "bench"]
    if artifacts.onnx is not None:
        folder, words = folder.parent, [*words, "--onnx", str(artifacts.onnx)]
    elif folder.name.removeprefix("seeded-") in SEEDED and folder.name.startswith("seeded-"):
        folder, words = folder.parent, [*words, "--seeded", folder.name.removeprefix("seeded-")]
    if folder != ARTIFACTS:
        words += ["--artifacts", str(folder)]
    return shlex.join([*words, "--remake"])


def _exported(
    form: str, options: str = "", *, precision: str = "fp32", last: bool = False, proof: bool = True
) -> BuildRule:
    def make(source: Path, path: Path) -> None:
        from export.onnx import export_onnx

        export_onnx(source, path, form=form, precision=precision, last=last, proof=proof)

    def origin(path: Path) -> str:
        from export.artifact import load_exported

        return load_exported(path).checkpoint_sha256

    return BuildRule(CHECKPOINT, make, origin, "exported", f"python -m export.onnx {{source}} -o {{path}}{options}")


def _compiled(source: str, level: int, precision: str = "fp32", arch: str | None = None) -> BuildRule:
    def make(source: Path, path: Path) -> None:
        from tvm_frontend.compile import compile_model
        from tvm_frontend.options import CompileOptions

        target = "cuda" if arch else "llvm"
        compile_model(source, path, CompileOptions(target=target, arch=arch, opt_level=level, precision=precision))

    def origin(path: Path) -> str:
        from tvm_frontend.artifact import load_compiled

        return load_compiled(path).exported_sha256

    command = f"python -m tvm_frontend.compile {{source}} -o {{path}} --opt-level {level}"
    command += f" --target cuda --arch {arch}" if arch else ""
    command += "" if precision == "fp32" else f" --precision {precision}"
    return BuildRule(source, make, origin, "compiled", command)


def _compiled_by_relay(source: str, level: int, arch: str | None = None) -> BuildRule:
    def make(source: Path, path: Path) -> None:
        from tvm_frontend.compile import compile_model
        from tvm_frontend.options import CompileOptions

        B, T = map(int, path.name.split("x"))
        target = "cuda" if arch else "llvm"
        options = CompileOptions(target=target, arch=arch, opt_level=level, frontend="relay", fixed_shape=(B, T))
        compile_model(source, path, options)

    def origin(path: Path) -> str:
        from tvm_frontend.artifact import load_compiled

        return load_compiled(path).exported_sha256

    options = f"--frontend relay --opt-level {level} --batch {{B}} --tokens {{T}}"
    options += f" --target cuda --arch {arch}" if arch else ""
    command = f"python -m tvm_frontend.compile {{source}} -o {{path}} {options}"
    return BuildRule(source, make, origin, "compiled", command, static=True)


def _quantized(source: str, tool: str, bits: int) -> BuildRule:
    def make(source: Path, path: Path) -> None:
        from export.quantize import quantize_onnxruntime, quantize_openvino

        quantize_onnxruntime(source, path) if tool == "onnxruntime" else quantize_openvino(source, path, bits)

    def origin(path: Path) -> str:
        from export.quantize import origin_of

        return origin_of(path)

    command = f"python -m export.quantize {{source}} -o {{path}} --tool {tool} --bits {bits}"
    return BuildRule(source, make, origin, "quantised", command)


def _converted() -> BuildRule:
    def make(source: Path, path: Path) -> None:
        from export.ctranslate2 import convert_ctranslate2

        convert_ctranslate2(source, path)

    def origin(path: Path) -> str:
        from export.ctranslate2 import origin_of

        return origin_of(path)

    return BuildRule(CHECKPOINT, make, origin, "converted", "python -m export.ctranslate2 {source} -o {path}")


# Ordered so that each file comes after its source.
BUILD_RULES = {
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
