"""What a user can get wrong, and what each command says of it: one line, exit code 2, and nothing changed on disk.

TABLE is the whole of it: a command line, as behind `python -m`, in a folder with the files of `make_files`, and what
its error must say. All run in one process, by the function that the command's module calls.
"""

import hashlib
import importlib
import json
import os
import pickle
import random
import re
import shlex
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from export.huggingface import export_huggingface
from export.onnx import export_onnx
from gpt.checkpoint import KIND, VERSION, Checkpoint, save_checkpoint, seeded_checkpoint
from gpt.cli import run_command
from gpt.config import GPTConfig
from gpt.corpus import CorpusConfig, build_corpus
from gpt.tokenizer import CharTokenizer
from tvm_frontend.compile import compile_model
from tvm_frontend.options import CompileOptions

LONG = "x" * 300  # a file's name must not have more than 255 bytes
CHARACTERS = "\n abcdefghijklmnopqrstuvwxyz"
# Commands whose module does nothing but call another's `main`.
MAINS = {
    "bench": "bench.__main__",
    "bench.ladder": "bench.studies.ablation",
    "bench.search": "bench.studies.search",
    "bench.support": "bench.studies.support",
    "bench.training": "bench.studies.training",
    "gpt-frontend": "gpt.commands",
}
TABLE = """
# @@TABLE@@
"""


def rows() -> list[tuple[str, str]]:
    """Return the command lines of the table, each with what its error must say."""
    found = [line for line in TABLE.splitlines() if line and not line.startswith("#")]
    return [(command.strip(), says.strip()) for command, says in (line.split(" → ") for line in found)]


def make_files(folder: Path) -> None:
    """Write one sound file of each kind, and files and folders with all kinds of faults."""
    checkpoint = seeded_checkpoint(GPTConfig(block_size=16, vocab_size=28, n_layer=1, n_head=2, n_embd=32))
    checkpoint = replace(checkpoint, step=3, tokenizer=CharTokenizer(CHARACTERS).to_json())
    save_checkpoint(folder / "ckpt.pt", checkpoint)
    save_checkpoint(folder / "bigram.pt", seeded_checkpoint(GPTConfig.bigram(vocab_size=28, block_size=16)))
    exported = export_onnx(folder / "ckpt.pt", folder / "model.onnx", proof=False)
    compile_model(exported.path, folder / "tvm", CompileOptions(opt_level=0))
    export_huggingface(folder / "ckpt.pt", folder / "hf")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    build_corpus(CorpusConfig(str(folder / "text.txt"), folder / "corpus", tokenizer="characters"))
    make_others(folder)
    make_checkpoints(folder, checkpoint)
    make_exports(folder)
    make_folders(folder)


def make_others(folder: Path) -> None:
    """Write files that no command takes."""
    (folder / "empty").touch()
    (folder / "folder").mkdir()
    (folder / "random").write_bytes(random.Random(0).randbytes(5000))
    (folder / "latin1.txt").write_bytes("Köln und Düsseldorf\n".encode("latin-1") * 100)
    (folder / "nowhere").symlink_to("not-here")
    (folder / "loop").symlink_to("loop")
    with zipfile.ZipFile(folder / "zip", "w") as archive:
        archive.writestr("text", "a text in an archive")
    with tarfile.open(folder / "tar", "w") as archive:
        archive.add(folder / "text.txt", "text.txt")
    (folder / "pickle").write_bytes(pickle.dumps({"kind": KIND}))
    for name, content in (
        ("list.jsonl", "[1, 2]\n"),
        ("cut.jsonl", '{"text": "a"}\n{"text": "b'),
        ("number.jsonl", '{"text": 3}\n'),
        ("other.jsonl", '{"body": "a"}\n'),
        ("short.txt", "ab"),
        ("blank.txt", ""),
        ("text.parquet", "no parquet"),
    ):
        (folder / name).write_text(content)


def make_checkpoints(folder: Path, checkpoint: Checkpoint) -> None:
    """Write checkpoints that are damaged, or hold what a checkpoint must not."""
    content = (folder / "ckpt.pt").read_bytes()
    (folder / "cut.pt").write_bytes(content[:-1000])
    (folder / "flipped.pt").write_bytes(flipped(content))
    sound = {"kind": KIND, "version": VERSION, "config": asdict(checkpoint.config), "step": 3, "losses": {}}
    sound |= {"state": checkpoint.state, "tokenizer": checkpoint.tokenizer}
    weight = "transformer.h.0.mlp.c_fc.weight"
    nan = checkpoint.state | {weight: torch.full_like(checkpoint.state[weight], float("nan"))}
    for name, changes in {
        "nan": {"state": nan},
        "version": {"version": 99},
        "list": {"state": [1, 2]},
        "shape": {"config": sound["config"] | {"n_embd": 64}},
        "unknown": {"config": sound["config"] | {"rope": True}},
        "heads": {"config": sound["config"] | {"n_head": 5}},
        "tokens": {"tokenizer": {"kind": "words"}},
        "letters": {"tokenizer": CharTokenizer("ab").to_json()},
    }.items():
        torch.save(sound | changes, folder / f"{name}.pt")
    torch.save({"a": 1}, folder / "other.pt")


def make_exports(folder: Path) -> None:
    """Write ONNX files that are damaged, and ones of others with faults."""
    content = (folder / "model.onnx").read_bytes()
    (folder / "cut.onnx").write_bytes(content[:-1000])
    (folder / "flipped.onnx").write_bytes(flipped(content))
    proto = onnx.load(folder / "model.onnx")
    proto.ClearField("metadata_props")
    onnx.save(proto, folder / "theirs.onnx")

    def changed(name: str, change: Callable[[onnx.ModelProto], object]) -> None:
        other = onnx.ModelProto()
        other.CopyFrom(proto)
        change(other)
        (folder / f"{name}.onnx").write_bytes(other.SerializeToString())

    def weight(model: onnx.ModelProto) -> onnx.TensorProto:
        return next(tensor for tensor in model.graph.initializer if tensor.name == "transformer.wpe.weight")

    def outside(model: onnx.ModelProto, location: str, offset: str = "0", length: str = "2048") -> None:
        tensor = weight(model)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=value)

    values = np.full((16, 32), np.nan, np.float32).tobytes()
    changed("nan", lambda model: setattr(weight(model), "raw_data", values))
    changed("dims", lambda model: weight(model).dims.append(3))
    changed("up", lambda model: outside(model, "../data"))
    changed("absolute", lambda model: outside(model, "/etc/hostname"))
    changed("nameless", lambda model: outside(model, ""))
    changed("missing", lambda model: outside(model, "not-here.data"))
    changed("short", lambda model: outside(model, "text.txt"))
    changed("beyond", lambda model: outside(model, "random", "10000000"))
    changed("negative", lambda model: outside(model, "random", "-5"))
    changed("words", lambda model: outside(model, "random", "five"))
    changed("length", lambda model: outside(model, "random", "0", "17"))
    changed("dangling", lambda model: outside(model, "nowhere"))
    changed("looped", lambda model: outside(model, "loop"))
    changed("undefined", lambda model: model.graph.node[5].input.__setitem__(0, "nothing"))
    changed("twice", lambda model: model.graph.node.append(model.graph.node[3]))
    changed("operator", lambda model: setattr(model.graph.node[5], "op_type", "Nonsense"))
    changed("domain", lambda model: setattr(model.graph.node[5], "domain", "com.example"))
    changed("opset", lambda model: setattr(model.opset_import[0], "version", 99))
    changed("no-opset", lambda model: model.ClearField("opset_import"))
    changed("no-nodes", lambda model: model.graph.ClearField("node"))
    changed("no-input", lambda model: model.graph.ClearField("input"))
    changed("no-output", lambda model: model.graph.ClearField("output"))
    (folder / "utf8.onnx").write_bytes((folder / "theirs.onnx").read_bytes().replace(b"wpe", b"wp\xff"))


def make_folders(folder: Path) -> None:
    """Write folders of Hugging Face's, of compiled models and of corpora, each with one fault."""
    weights = {path.name: path.read_bytes() for path in (folder / "hf").iterdir() if path.name != "gpt_frontend.json"}
    config = json.loads(weights["config.json"])
    faults: dict[str, dict[str, object]] = {
        "hf-json": {"config.json": "{"},
        "hf-list": {"config.json": "[]"},
        "hf-deep": {"config.json": "[" * 100_000},
        "hf-latin1": {"config.json": b'{"model_type": "gpt2\xff"}'},
        "hf-llama": {"config.json": config | {"model_type": "llama"}},
        "hf-kind": {"config.json": config | {"model_type": ["gpt2"]}},
        "hf-activation": {"config.json": config | {"activation_function": {"a": 1}}},
        "hf-heads": {"config.json": config | {"n_head": "two"}},
        "hf-embd": {"config.json": config | {"n_embd": 33}},
        "hf-layers": {"config.json": config | {"n_layer": 10**9}},
        "hf-vocab": {"config.json": config | {"vocab_size": -1}},
        "hf-inner": {"config.json": config | {"n_inner": "wide"}},
        "hf-epsilon": {"config.json": config | {"layer_norm_epsilon": None}},
        "hf-no-config": {"config.json": None},
        "hf-no-weights": {"model.safetensors": None},
        "hf-weights": {"model.safetensors": b"\x08\0\0\0\0\0\0\0{}"},
        "hf-cut": {"model.safetensors": weights["model.safetensors"][:-100]},
        "hf-tokenizer": {"tokenizer.json": {"model": []}},
        "hf-merges": {"tokenizer.json": {"model": {"merges": 3}}},
        "hf-merges-txt": {"merges.txt": b"a \xff\n"},
        "hf-up": shards({"wte.weight": "../hf/model.safetensors"}),
        "hf-absolute": shards({"wte.weight": "/etc/hostname"}),
        "hf-shards": shards(["model.safetensors"]),
        "hf-shard-number": shards({"wte.weight": 3}),
        "hf-shard-missing": shards({"wte.weight": "model-00001.safetensors"}),
    }
    for name, changes in faults.items():
        (folder / name).mkdir()
        for file, content in (weights | changes).items():
            if content is not None:
                text = content if isinstance(content, str | bytes) else json.dumps(content)
                (folder / name / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    for name, source, file, change in (
        ("hf-flipped", "hf", "model.safetensors", flipped),
        ("tvm-flipped", "tvm", "library.so", flipped),
        ("tvm-json", "tvm", "model.json", lambda content: content[:-20]),
        ("tvm-list", "tvm", "model.json", lambda content: b"[]"),
        ("tvm-edited", "tvm", "model.json", lambda content: content.replace(b'"vocab_size": 28', b'"vocab_size": 99')),
        ("tvm-weights", "tvm", "weights.bin", None),
        ("corpus-json", "corpus", "manifest.json", lambda content: content[:-20]),
        ("corpus-list", "corpus", "manifest.json", lambda content: b"[]"),
        ("corpus-keys", "corpus", "manifest.json", keys_of_a_corpus),
        ("corpus-up", "corpus", "manifest.json", lambda content: content.replace(b'"train-0', b'"../corpus/train-0')),
        ("corpus-cut", "corpus", "train-00000.bin", lambda content: content[:-2]),
        ("corpus-gone", "corpus", "val-00000.bin", None),
    ):
        shutil.copytree(folder / source, folder / name)
        path = folder / name / file
        if change is None:
            path.unlink()
        else:
            path.write_bytes(change(path.read_bytes()))


def shards(weight_map: object) -> dict[str, object]:
    """Return what a folder with several files of weights has in place of one."""
    return {"model.safetensors": None, "model.safetensors.index.json": {"weight_map": weight_map}}


def keys_of_a_corpus(content: bytes) -> bytes:
    found = json.loads(content)
    return json.dumps({name: found[name] for name in ("kind", "version", "complete")}).encode()


def flipped(content: bytes) -> bytes:
    """Return the content with one bit in its middle flipped."""
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


def contents(folder: Path) -> dict[str, str]:
    """Return what is in a folder: each path with a hash of its bytes, the target of a link, or that it is a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = f"link to {os.readlink(path)}"
        else:
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return found


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which all commands run."""
    folder = tmp_path_factory.mktemp("files")
    make_files(folder)
    return folder


@pytest.fixture(scope="session")
def before(files: Path) -> dict[str, str]:
    return contents(files)


@pytest.fixture
def run(
    files: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> Iterator[Callable[[str], tuple[int, str]]]:
    """Run a command line in the folder; its exit code and what it wrote to standard error."""
    monkeypatch.chdir(files)
    monkeypatch.setenv("COLUMNS", "500")  # a usage error's frame breaks no line

    def run(line: str) -> tuple[int, str]:
        module, *arguments = shlex.split(line.replace("{long}", LONG))
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        main = importlib.import_module(MAINS.get(module, module)).main
        capfd.readouterr()
        try:
            run_command(main)
            code: object = 0
        except SystemExit as end:
            code = end.code
        return int(code or 0) if isinstance(code, int | None) else 1, capfd.readouterr().err

    return run


def test_the_table_has_every_command_and_nothing_twice() -> None:
    commands = [line for line, _ in rows()]
    assert len(set(commands)) == len(commands) >= 150


@pytest.mark.parametrize(("line", "says"), rows(), ids=[line[:90] for line, _ in rows()])
def test_a_bad_input_is_one_line(
    run: Callable[[str], tuple[int, str]], files: Path, before: dict[str, str], line: str, says: str
) -> None:
    code, err = run(line)
    assert code == 2, err
    assert "Traceback" not in err
    assert says in err, err
    lines = [each for each in re.split(r"[\r\n]", err) if each.strip()]
    usage = lines[0].startswith("╭")  # tyro's frame around what is wrong with the arguments
    assert usage or [each.startswith("error: ") for each in lines] == [True], err
    assert contents(files) == before
