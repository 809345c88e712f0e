"""Commands that are killed at, or fail in, each of their operations on files.

Whatever the moment, the output is the whole old one or the whole new one, and the same command run again makes the new
one and leaves nothing else. By default a spread of the operations is tried, with the first, the last and all renames;
`-m long` tries every one.
"""

import errno
import hashlib
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from export.onnx import export_onnx
from gpt.checkpoint import save_checkpoint, seeded_checkpoint
from gpt.config import GPTConfig
from gpt.tokenizer import CharTokenizer

KILL, FULL, BROKEN = 0, errno.ENOSPC, errno.EIO
NEEDS_ROOM = "oWfm"  # of the kinds of operations: to open, write, flush and make a folder
SPREAD = 6  # operations that are tried by default, besides the renames
CHARACTERS = "\n abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Command:
    """A command that writes below a folder.

    arguments: with {inputs} and {out} for two folders. old: the same, for what made the files that it replaces; None if
    it replaces none. output: the names of what it makes, where that is not all that it writes. kept: whether it leaves
    files beside the output with which it goes on after a failure. together: whether a kill may leave some of the files.
    spread: how many operations are tried by default, besides the renames; none of a command that takes seconds. needs:
    packages that may be absent.
    """

    module: str
    arguments: str
    old: str | None = None
    patches: tuple[tuple[str, str, object], ...] = ()
    output: tuple[str, ...] = ()
    kept: bool = False
    together: bool = False
    spread: int = SPREAD
    needs: tuple[str, ...] = ()


EXPORT = "{inputs}/%s.pt -o {out}/model.onnx --exporter torchscript"
COMMANDS = {
    "train": Command(
        "gpt.train",
        "tiny --corpus {inputs}/fox.txt --max-steps 3 --save-interval 1 --eval-interval 2 --eval-batches 1"
        " --batch-size 4 --no-tensorboard --device cpu --threads 1 --resume --seed 2 -o {out}/ckpt.pt",
        patches=(("gpt.train", "sample", None),),
        output=("ckpt.pt",),
        kept=True,
    ),
    "corpus": Command(
        "gpt.corpus", "{inputs}/fox.txt -o {out}/corpus --tokenizer characters --shard-tokens 900", kept=True
    ),
    "export": Command("export.onnx", EXPORT % "b", EXPORT % "a", spread=3),
    "export in two files": Command(
        "export.onnx", EXPORT % "b", EXPORT % "a", (("export.storage", "INLINE_BYTES", 0),), spread=3
    ),
    "huggingface": Command("export.huggingface", "{inputs}/b.pt -o {out}/hf", "{inputs}/a.pt -o {out}/hf"),
    "quantize": Command(
        "export.quantize", "{inputs}/b.onnx -o {out}/int8.onnx", "{inputs}/a.onnx -o {out}/int8.onnx", spread=4
    ),
    "ctranslate2": Command(
        "export.ctranslate2",
        "{inputs}/b.pt -o {out}/ct2",
        "{inputs}/a.pt -o {out}/ct2",
        spread=2,
        needs=("ctranslate2", "transformers"),
    ),
    "export with cache": Command(
        "export.onnx",
        "{inputs}/b.pt -o {out}/cache.onnx --with-cache",
        "{inputs}/a.pt -o {out}/cache.onnx --with-cache",
        spread=0,
    ),
    "compile": Command(
        "tvm_frontend.compile", "{inputs}/b.onnx -o {out}/tvm", "{inputs}/a.onnx -o {out}/tvm", spread=0
    ),
    "report": Command("write_report", "new {out}", "old {out}", together=True, spread=20),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A text, and two checkpoints and their exports."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "fox.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    config = GPTConfig(block_size=16, vocab_size=len(CHARACTERS), n_layer=1, n_head=2, n_embd=32)
    for seed, name in enumerate("ab"):
        checkpoint = replace(seeded_checkpoint(config, seed), tokenizer=CharTokenizer(CHARACTERS).to_json())
        save_checkpoint(folder / f"{name}.pt", checkpoint)
        export_onnx(folder / f"{name}.pt", folder / f"{name}.onnx", exporter="torchscript")
    return folder


def files_in(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file, by its name in the folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@dataclass
class Case:
    """A command, the files that it finds and those that it makes, and its operations."""

    command: Command
    run: Callable
    before: Path
    old: dict[str, str] = field(default_factory=dict)
    new: dict[str, str] = field(default_factory=dict)
    kinds: str = ""

    def made(self, files: dict[str, str]) -> dict[str, str]:
        return {name: sha for name, sha in files.items() if not self.command.output or name in self.command.output}

    def disturb(self, out: Path, number: int, error: int) -> None:
        """Run the command with its n-th operation disturbed, and again without, and look at the output after both."""
        shutil.copytree(self.before, out)
        ended = self.run(out, number=number, error=error)
        what = f"operation {number} of {len(self.kinds)} ({self.kinds[number - 1]}): {ended.code}\n{ended.err}"
        found = files_in(out)
        if error == KILL:
            assert ended.code == -signal.SIGKILL, what
        else:
            assert ended.code in (0, 2), what
            assert "Traceback" not in ended.err, what
            assert "Exception ignored" not in ended.err, what
            assert ended.err.count("error: ") == (ended.code == 2), what
        self.check(found, what, killed=error == KILL, done=ended.code == 0)
        if error == FULL and not self.command.kept:  # all that was begun is removed
            assert found in (self.old, self.new), what
        again = self.run(out)
        assert again.code == 0, f"{what}\nthen {again.err}"
        assert self.made(files_in(out)) == self.made(self.new), what
        names = {path.name for path in out.rglob("*") if path.name.startswith(".")}
        assert names == set(), what
        shutil.rmtree(out)

    def check(self, found: dict[str, str], what: str, *, killed: bool, done: bool) -> None:
        """Whether what was made is whole, and old or new."""
        old, new = self.made(self.old), self.made(self.new)
        seen = {name: sha for name, sha in found.items() if name in old or name in new}
        if self.command.old is None and not self.command.output:  # it says itself that it is half made
            assert not done or seen == new, what
        elif self.command.together and killed:
            assert seen.items() <= old.items() or seen.items() <= new.items(), what
        else:
            assert (not done and old.items() <= seen.items()) or new.items() <= seen.items(), what


@pytest.fixture(scope="module")
def case(request, disturbed, inputs, tmp_path_factory) -> Case:
    command, tmp_path = COMMANDS[request.param], tmp_path_factory.mktemp("case")
    for package in command.needs:
        pytest.importorskip(package)

    def run(out: Path, arguments: str = command.arguments, **how):
        words = arguments.format(inputs=inputs, out=out).split()
        return disturbed(command.module, words, out, patches=command.patches, **how)

    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    if command.old is not None:
        made = run(before, command.old)
        assert made.code == 0, made.err
    if command.output:
        shutil.copy(inputs / "a.pt", before / command.output[0])
    shutil.copytree(before, after)
    made = run(after)
    assert made.code == 0, made.err
    return Case(command, run, before, files_in(before), files_in(after), made.kinds)


def spread_of(case: Case, kinds: str) -> list[int]:
    """Some of the operations of certain kinds, counted from 1: the first, the last, all renames, and some between."""
    able = [number for number, kind in enumerate(case.kinds, 1) if kind in kinds]
    step = max(1, (len(able) - 1) // max(1, case.command.spread - 1))
    renames = [number for number in able if case.kinds[number - 1] == "R"]
    return sorted({*able[::step], able[0], able[-1], *renames})


@pytest.mark.slow
@pytest.mark.parametrize(("error", "kinds"), [(KILL, "oWftRumc"), (FULL, NEEDS_ROOM), (BROKEN, "oWftRumc")])
@pytest.mark.parametrize("case", [name for name, command in COMMANDS.items() if command.spread], indirect=True)
def test_the_output_is_old_or_new_at_any_moment(case, tmp_path, error, kinds):
    assert "R" in case.kinds
    for number in spread_of(case, kinds):
        case.disturb(tmp_path / "out", number, error)


@pytest.mark.long
@pytest.mark.parametrize(("error", "kinds"), [(KILL, "oWftRumc"), (FULL, NEEDS_ROOM), (BROKEN, "oWftRumc")])
@pytest.mark.parametrize("case", COMMANDS, indirect=True)
def test_the_output_is_old_or_new_at_every_moment(case, tmp_path, error, kinds):
    for number, kind in enumerate(case.kinds, 1):
        if kind in kinds:
            case.disturb(tmp_path / "out", number, error)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["out", "tmp"])
def test_a_disk_that_is_full_where_the_linker_writes_is_one_line_and_leaves_nothing(disturbed, inputs, tmp_path, place):
    """The compiler and the linker are processes of their own, in each of which the first operation fails."""
    for name in ("out", "tmp"):
        (tmp_path / name).mkdir()
    full = {"FAULTS": f"1 {FULL} {tmp_path / place}", "TMPDIR": str(tmp_path / "tmp")}
    arguments = [str(inputs / "b.onnx"), "-o", str(tmp_path / "out" / "tvm"), "--opt-level", "0"]
    ended = disturbed("tvm_frontend.compile", arguments, tmp_path / "none", variables=full)
    assert ended.code == 2, ended.err
    assert re.search(r"^error: \S+ cannot link the library: .*; is the disk full, at ", ended.err, re.MULTILINE)
    assert ("No space left on device" in ended.err) == (place == "out")  # g++ itself does not say it of the other
    assert "Traceback" not in ended.err
    assert list((tmp_path / "out").iterdir()) == []
