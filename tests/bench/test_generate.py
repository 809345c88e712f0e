"""Tests `python -m bench.generate`: every engine with a cache gives the same text; the impossible is refused."""

import string
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest

from bench.generate import MOST_TOKENS, run
from bench.models.artifacts import Artifacts
from bench.models.build import SEEDED
from bench.models.external import Reference, open_external, read_external
from gpt.checkpoint import load_checkpoint, save_checkpoint, seeded_checkpoint
from gpt.cli import UserError
from gpt.config import GPTConfig
from gpt.generate import generate
from gpt.tokenizer import CharTokenizer

pytestmark = pytest.mark.slow

CONFIG = SEEDED["tiny"]
TOKENIZER = CharTokenizer("".join(sorted(string.ascii_lowercase + "é\n .,")))
PROMPT = "abc"


@pytest.fixture
def folder(tiny: Artifacts, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Provide the folder of a model whose 31 tokens are characters."""
    monkeypatch.setattr("bench.generate.tokenizer_from_json", lambda _: TOKENIZER)
    return tiny.folder


@pytest.fixture
def text(folder: Path) -> str:
    """Generate the expected text by eager PyTorch, without an engine."""
    model = load_checkpoint(folder / "ckpt.pt").build()
    return PROMPT + TOKENIZER.decode(list(generate(model, TOKENIZER.encode(PROMPT), 13, temperature=0)))


@pytest.mark.parametrize("engine", ["eager", "onnxruntime", "openvino", "tvm"])
def test_every_engine_writes_what_the_model_does(
    engine: str, folder: Path, text: str, capsys: pytest.CaptureFixture
) -> None:
    run(engine, PROMPT, 13, folder, threads=1)
    out, err = capsys.readouterr()
    assert out == text + "\n"
    assert "ms to the first token" in err


def test_without_a_number_as_many_come_as_fit(folder: Path, text: str, capsys: pytest.CaptureFixture) -> None:
    run("eager", PROMPT, None, folder, threads=1)
    out, _ = capsys.readouterr()
    assert len(out) == len(PROMPT) + min(MOST_TOKENS, CONFIG.block_size + 1 - len(PROMPT)) + 1
    assert out.startswith(text)


def test_each_token_is_printed_as_it_comes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = []
    monkeypatch.setattr("builtins.print", lambda text="", **options: printed.append((text, options.get("flush"))))
    run("eager", PROMPT, 3, folder, threads=1)
    assert [len(text) for text, flushed in printed if flushed] == [3, 1, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("eager", PROMPT, 69), "69 tokens after a prompt of 3: only 1 to 68 fit, as block_size=70"),
        (("eager", PROMPT, 0), "0 tokens after a prompt of 3: only 1 to 68 fit"),
        (("eager", "a" * 71), "after a prompt of 71: none fits, as block_size=70; shorten the prompt"),
        (("eager", "x!"), "the character '!'"),
        (("eager", ""), "no token ids"),
        (("nonesuch",), "engine 'nonesuch': not known"),
    ],
)
def test_what_does_not_fit_is_a_users_mistake(arguments: tuple, says: str, folder: Path) -> None:
    with pytest.raises(UserError, match=says):
        run(*arguments, artifacts=folder)


def test_threads_are_checked_at_the_door(folder: Path) -> None:
    with pytest.raises(UserError, match="threads=0"):
        run("eager", PROMPT, 1, folder, threads=0)


def test_a_bigram_has_no_cache(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "ckpt.pt", seeded_checkpoint(GPTConfig.bigram(vocab_size=5, block_size=8)))
    with pytest.raises(UserError, match=r"no KV cache to generate with; use python -m gpt\.generate"):
        run("eager", artifacts=tmp_path)


def test_the_command_ends_with_one_line(python: Callable[..., CompletedProcess]) -> None:
    done = python("bench.generate", "--engine", "nonesuch")
    assert done.returncode == 2
    assert done.stderr.startswith("error: engine 'nonesuch': not known")
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture
def theirs(foreign_file: Callable[..., Path], tmp_path: Path) -> Path:
    """An ONNX file of others with a past, for 16 tokens at most; each of its 37 ids is a letter, a digit or a space."""
    return foreign_file(tmp_path / "theirs.onnx", ("input_ids", "attention_mask"))


def greedily(path: Path, ids: list[int], tokens: int) -> list[int]:
    """The likeliest tokens by the file in float64, without its past."""
    artifacts, _ = open_external(path, path.parent)
    reference, found = Reference(), list(ids)
    reference.load(artifacts, read_external(path).shape, 1, "")
    for _ in range(tokens):
        found.append(int(reference.logits(np.array([found]))[0, -1].argmax()))
    return found[len(ids) :]


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino", "tvm"])
def test_a_file_of_others_is_continued_by_numbers(
    engine: str, theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run(engine, tokens=9, artifacts=tmp_path, threads=1, onnx=theirs, prompt_ids=(3, 1, 4))
    assert capsys.readouterr().out.split() == [str(token) for token in greedily(theirs, [3, 1, 4], 9)]


def test_the_tokenizer_beside_a_file_is_its_own(theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    letters = string.ascii_lowercase + string.digits + " "
    model = tokenizers.models.WordLevel({letter: index for index, letter in enumerate(letters)}, unk_token=" ")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.save(str(theirs.with_name("tokenizer.json")))
    run("onnxruntime", "abc", 5, tmp_path, threads=1, onnx=theirs)
    expected = "".join(letters[token] for token in greedily(theirs, [0, 1, 2], 5))
    assert capsys.readouterr().out == f"abc{expected}\n"


@pytest.mark.parametrize(
    ("engine", "past", "how", "says"),
    [
        ("onnxruntime", False, {}, r"theirs.onnx has no KV cache to generate with; export it with inputs of past keys"),
        (
            "onnxruntime",
            True,
            {},
            r"theirs.onnx: nothing says what its 37 tokens are, as a tokenizer.json beside",
        ),
        ("eager", True, {}, "'eager' was asked for and is absent: needs the model's checkpoint"),
        ("onnxruntime", True, {"prompt_ids": (3,) * 17}, "after a prompt of 17: none fits, as block_size=16"),
        ("onnxruntime", True, {"prompt_ids": (40,)}, r"token id 40: must be in 0 … 36"),
    ],
)
def test_what_cannot_be_generated_by_a_file_is_said(
    engine: str, past: bool, how: dict, says: str, foreign_file: Callable[..., Path], tmp_path: Path
) -> None:
    path = foreign_file(tmp_path / "theirs.onnx", past=past)
    with pytest.raises(UserError, match=says):
        run(engine, artifacts=tmp_path, threads=1, onnx=path, **how)
