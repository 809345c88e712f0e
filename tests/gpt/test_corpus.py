import json
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from gpt.cli import UserError
from gpt.corpus import CorpusConfig, build_corpus, load_corpus, verify_corpus
from gpt.tokenizer import CharTokenizer, GPT2Tokenizer

TEXT = "".join(f"line {number}: ß\n" for number in range(200))


class Bytes:
    """An encoding like tiktoken's whose tokens are bytes, so that tests need no table."""

    def encode_ordinary(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_ordinary_batch(self, texts: list[str], num_threads: int) -> list[list[int]]:
        return [self.encode_ordinary(text) for text in texts]


@pytest.fixture
def bytewise(monkeypatch) -> None:
    monkeypatch.setattr("gpt.tokenizer._gpt2_encoding", lambda: (Bytes(), "bytes"))


@pytest.fixture
def jsonl(tmp_path) -> Path:
    """100 documents: `0.`, `1.` … `99.`"""
    path = tmp_path / "numbers.jsonl"
    path.write_text("".join(json.dumps({"text": f"{number}."}) + "\n" for number in range(100)))
    return path


@pytest.fixture
def config(jsonl, tmp_path) -> CorpusConfig:
    return CorpusConfig(str(jsonl), tmp_path / "corpus", tokenizer="characters", shard_tokens=50)


def everything(tokens):
    return tokens.read(0, len(tokens)).tolist()


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_default_is_pythons_sources():
    corpus = load_corpus(None)
    assert "standard library" in corpus.name
    assert len(corpus.train) > 9 * 10**5
    assert corpus.tokenizer.vocab_size == len(corpus.tokenizer.characters) <= 97


def test_a_text_is_cut_90_to_10(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    corpus = load_corpus(tmp_path / "text.txt")
    cut = len(TEXT) * 9 // 10
    assert corpus.tokenizer == CharTokenizer.of_text(TEXT)
    assert corpus.tokenizer.decode(everything(corpus.train)) == TEXT[:cut]
    assert corpus.tokenizer.decode(everything(corpus.val)) == TEXT[cut:]


@pytest.mark.parametrize("tokenizer", ["characters", "gpt2"])
def test_a_texts_folder_has_the_tokens_of_the_text(tmp_path, bytewise, tokenizer):
    (tmp_path / "text.txt").write_text(TEXT)
    found = build_corpus(CorpusConfig(str(tmp_path / "text.txt"), tmp_path / "corpus", tokenizer))
    wanted = load_corpus(tmp_path / "text.txt", tokenizer)
    assert found.tokenizer == wanted.tokenizer
    assert everything(found.train) == everything(wanted.train)
    assert everything(found.val) == everything(wanted.val)


def test_every_tenth_document_validates(config):
    corpus = build_corpus(config)
    tenth = range(9, 100, 10)
    assert corpus.tokenizer.decode(everything(corpus.val)) == "".join(f"{number}." for number in tenth)
    rest = "".join(f"{number}." for number in range(100) if number not in tenth)
    assert corpus.tokenizer.decode(everything(corpus.train)) == rest


def test_gpt2s_end_of_text_stands_between_documents_also_across_shards(config, bytewise):
    corpus = build_corpus(replace(config, tokenizer="gpt2"))
    val = [list(f"{number}.".encode()) for number in range(9, 100, 10)]
    assert everything(corpus.val) == [index for ids in val for index in (50256, *ids)][1:]
    assert len(corpus.train.parts) > 3
    assert everything(corpus.train).count(50256) == 89


def test_a_new_line_stands_between_documents_if_the_characters_have_one(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"a{number}\nb"}) + "\n" for number in range(10)))
    corpus = build_corpus(CorpusConfig(str(path), tmp_path / "corpus", "characters"))
    assert corpus.tokenizer.decode(everything(corpus.train)).startswith("a0\nb\na1\nb\na2")


def test_shards_are_full_at_the_end_of_a_document(config):
    build_corpus(config)
    manifest = json.loads((config.output / "manifest.json").read_text())
    for train, val in zip(manifest["train"][:-1], manifest["val"], strict=False):
        assert 50 <= train["tokens"] + val["tokens"] <= 50 + 50


def test_tokens_take_two_bytes_or_four_where_they_must(tmp_path):
    build_corpus(CorpusConfig(str(_text_of(tmp_path, 1000)), tmp_path / "small", "characters"))
    large = build_corpus(CorpusConfig(str(_text_of(tmp_path, 70_000)), tmp_path / "large", "characters"))
    assert (tmp_path / "small" / "train-00000.bin").stat().st_size == 2 * 900
    assert (tmp_path / "large" / "train-00000.bin").stat().st_size == 4 * 63_000
    assert max(everything(large.val)) == 70_000 - 1


def _text_of(folder: Path, characters: int) -> Path:
    """A text of so many characters, no two the same."""
    path = folder / f"{characters}.txt"
    path.write_text("".join(chr(0x10000 + index) for index in range(characters)))
    return path


def test_shards_are_mapped_not_read(config):
    assert all(isinstance(part, np.memmap) for part in build_corpus(config).train.parts)


def test_the_share_to_validate_on_can_be_set(config):
    assert len(build_corpus(replace(config, val_share=0.5)).val) == 5 * 2 + 45 * 3


@pytest.mark.parametrize("share", [0.1, 0.15, 0.3, 0.4, 0.5])
def test_the_share_of_documents_is_exact_at_any_count(config, share):
    """Of the first n documents the share of n validates, rounded down, for each n."""
    corpus = build_corpus(replace(config, val_share=share))
    val = corpus.tokenizer.decode(everything(corpus.val)).split(".")[:-1]
    validates = [number in map(int, val) for number in range(100)]
    assert [sum(validates[:n]) for n in range(101)] == [int(n * Fraction(str(share))) for n in range(101)]


@pytest.mark.parametrize("tokens", [30, 31, 100, 217])
def test_max_tokens_of_documents_are_the_first_ones(config, tokens):
    corpus, whole = (
        build_corpus(replace(config, max_tokens=tokens)),
        build_corpus(replace(config, output=config.output / ".." / "whole")),
    )
    train, val = everything(corpus.train), everything(corpus.val)
    assert len(train) + len(val) == tokens
    assert everything(whole.train)[: len(train)] == train
    assert everything(whole.val)[: len(val)] == val


@pytest.mark.parametrize(("tokens", "share"), [(1000, 0.1), (999, 0.3), (1234, 0.4)])
def test_max_tokens_of_a_text_keep_the_share(tmp_path, tokens, share):
    (tmp_path / "text.txt").write_text(TEXT)
    made = CorpusConfig(str(tmp_path / "text.txt"), tmp_path / "corpus", "characters", val_share=share)
    corpus = build_corpus(replace(made, max_tokens=tokens))
    train = int(tokens * (1 - Fraction(str(share))))
    assert (len(corpus.train), len(corpus.val)) == (train, tokens - train)
    cut = int(len(TEXT) * (1 - Fraction(str(share))))
    assert corpus.tokenizer.decode(everything(corpus.train)) == TEXT[:train]
    assert corpus.tokenizer.decode(everything(corpus.val)) == TEXT[cut : cut + tokens - train]


def test_a_complete_corpus_is_verified_not_made_again(config):
    build_corpus(config)
    before = {path: path.stat().st_mtime_ns for path in config.output.iterdir()}
    build_corpus(config)
    assert {path: path.stat().st_mtime_ns for path in config.output.iterdir()} == before


def test_a_changed_shard_is_named(config):
    build_corpus(config)
    shard = config.output / "train-00001.bin"
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(UserError, match=r"train-00001.bin: is not as it was written"):
        verify_corpus(config.output)


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(b"ab")])
def test_an_absent_or_cut_shard_is_found_on_opening(config, harm):
    build_corpus(config)
    harm(config.output / "val-00000.bin")
    with pytest.raises(UserError, match=r"val-00000.bin: is absent or not"):
        load_corpus(config.output)


def test_other_settings_do_not_go_on_with_it(config):
    build_corpus(config)
    with pytest.raises(UserError, match="holds a corpus of another source or settings"):
        build_corpus(replace(config, val_share=0.2))


def test_a_changed_source_does_not_go_on_with_it(config, jsonl):
    build_corpus(config)
    jsonl.write_text(jsonl.read_text() + '{"text": "1"}\n')
    with pytest.raises(UserError, match="holds a corpus of another source or settings"):
        build_corpus(config)


def test_a_folder_with_something_else_is_left_alone(config):
    config.output.mkdir()
    (config.output / "thesis.tex").touch()
    with pytest.raises(UserError, match="holds something else than a corpus"):
        build_corpus(config)


def test_too_few_documents_to_hold_any_out(config, jsonl):
    jsonl.write_text('{"text": "one"}\n')
    with pytest.raises(UserError, match="its 1 documents leave nothing for val; change --val-share"):
        build_corpus(config)


def test_a_folder_that_is_no_corpus(tmp_path):
    with pytest.raises(UserError, match=r"no corpus \(manifest.json is absent\)"):
        load_corpus(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(config):
    build_corpus(config)
    manifest = json.loads((config.output / "manifest.json").read_text())
    (config.output / "manifest.json").write_text(json.dumps(manifest | {"tokenizer": {"kind": "none"}}))
    with pytest.raises(UserError, match=r"manifest.json: names no tokenizer; remove .* and make it again"):
        load_corpus(config.output)


SHARD = {"file": "train-00000.bin", "tokens": 5, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("complete", None, "its complete is 'None'"),
        ("request", [], "its request is"),
        ("tokenizer", 5, "its tokenizer is '5'"),
        ("documents", "9", "its documents is '9'"),
        ("dtype", "<f4", "its dtype is '<f4'"),
        ("dtype", ["<u2"], "its dtype is"),
        ("train", {}, "its train is '{}'"),
        ("val", [5], "file 0 of val is 5"),
        ("train", [SHARD | {"file": "../train-00000.bin"}], "file 0 of train is .*"),
        ("train", [SHARD | {"file": "/etc/passwd"}], "file 0 of train is"),
        ("train", [SHARD | {"file": ".."}], "file 0 of train is"),
        ("train", [SHARD | {"file": "val-00000.bin"}], "file 0 of train is"),
        ("train", [SHARD | {"tokens": -5}], "file 0 of train is"),
        ("train", [SHARD | {"tokens": 10**30}], "file 0 of train is"),
        ("train", [SHARD | {"sha256": "0"}], "file 0 of train is"),
        ("train", [SHARD | {"sha256": None}], "file 0 of train is"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_named(config, name, value, words):
    build_corpus(config)
    path = config.output / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    for read in (load_corpus, verify_corpus, lambda folder: build_corpus(config)):
        with pytest.raises(UserError, match=rf"manifest.json: is damaged \({words}.*\); remove .* and make it again"):
            read(config.output)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\udcff", "\0" * 100])
def test_a_manifest_that_is_no_json_is_named(config, text):
    build_corpus(config)
    (config.output / "manifest.json").write_text(text, errors="surrogateescape")
    with pytest.raises(UserError, match=r"manifest.json: cannot be read; remove .* and make it again"):
        load_corpus(config.output)


def test_a_corpus_knows_itself_by_its_tokens(config, tmp_path):
    corpus = build_corpus(config)
    identity = corpus.identity()
    assert [len(rows) for rows in identity.values()] == [len(corpus.train.parts), len(corpus.val.parts)]
    assert corpus.change_since(identity) is None
    assert corpus.change_since({}) == "its tokens of train are others"
    assert corpus.change_since(identity | {"val": identity["val"][:-1]}) == "its tokens of val are others"


def test_a_text_is_the_same_corpus_as_its_token_files(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    made = build_corpus(CorpusConfig(str(tmp_path / "text.txt"), tmp_path / "corpus", "characters"))
    text = load_corpus(tmp_path / "text.txt")
    assert text.change_since(made.identity()) is None
    assert made.change_since(text.identity()) is None


def test_another_tokenizer_than_the_folders_is_refused(config):
    build_corpus(config)
    with pytest.raises(UserError, match="was made with tokenizer 'characters', not 'gpt2'"):
        load_corpus(config.output, "gpt2")


@pytest.mark.parametrize(("field", "value"), [("val_share", 0.0), ("val_share", 0.6), ("shard_tokens", 0)])
def test_a_bad_value_names_field_and_value(config, field, value):
    with pytest.raises(UserError, match=f"{field}={value}: must be"):
        replace(config, **{field: value})


def test_killed_at_any_shard_it_goes_on_to_the_same_files(config, tmp_path, monkeypatch):
    build_corpus(config)
    wanted = content(config.output)
    again = replace(config, output=tmp_path / "again")
    write = os.replace
    for survived in range(10**6):
        left = survived % 7  # files that this life writes, before it dies at the next

        def replace_or_die(*paths: object) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            write(*paths)

        monkeypatch.setattr("os.replace", replace_or_die)
        try:
            build_corpus(again)
        except KeyboardInterrupt:
            continue
        break
    assert survived > 5
    assert content(again.output) == wanted


@pytest.mark.slow
def test_the_command_says_which_byte_pairs_it_read(run, tmp_path):
    try:
        table = GPT2Tokenizer().table
    except UserError as error:
        pytest.skip(str(error))
    (tmp_path / "text.txt").write_text(TEXT)
    done = run("gpt.corpus", "text.txt", "--tokenizer", "gpt2", "-o", "corpus")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == ["corpus: corpus, 50,257 different tokens", f"byte pairs: {table}"]


@pytest.mark.slow
def test_killed_command_goes_on_to_the_same_files(run, start, tmp_path):
    path = tmp_path / "numbers.jsonl"
    path.write_text("".join(json.dumps({"text": f"{number} " * 500}) + "\n" for number in range(2000)))
    arguments = ["gpt.corpus", path, "--tokenizer", "characters", "--shard-tokens", 200_000, "-o"]
    with start(*arguments, "killed") as process:
        while not list((tmp_path / "killed").glob("train-00002.bin")):
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    half_made = run("gpt.train", "tiny", "--corpus", "killed")
    assert half_made.returncode == 2
    assert "is half made; run the command that began it again" in half_made.stderr
    resumed, whole = run(*arguments, "killed"), run(*arguments, "whole")
    assert (resumed.returncode, whole.returncode) == (0, 0), resumed.stderr + whole.stderr
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert resumed.stdout.splitlines()[1:] == whole.stdout.splitlines()[1:]
    assert "100%" in resumed.stderr


@pytest.mark.slow
def test_opening_a_corpus_needs_neither_datasets_nor_pyarrow():
    code = "import sys, gpt.corpus; assert not {'datasets', 'pyarrow', 'tiktoken'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


# nanoGPT's token files


def save_tokens(folder: Path, characters: str | None, train: list[int], val: list[int]) -> Path:
    folder.mkdir()
    for part, ids in (("train", train), ("val", val)):
        np.array(ids, np.uint16).tofile(folder / f"{part}.bin")
    if characters is not None:
        (folder / "meta.pkl").write_bytes(pickle.dumps({"itos": dict(enumerate(characters))}))
    return folder


def test_nanogpts_tokens_are_a_corpus_of_its_characters(tmp_path):
    corpus = load_corpus(save_tokens(tmp_path / "data", "ba\n", [0, 1, 2, 0], [1, 1, 2]))
    assert corpus.tokenizer == CharTokenizer("ba\n")
    assert corpus.tokenizer.decode(corpus.train.read(0, 4)) == "ba\nb"
    assert corpus.val.read(0, 3).tolist() == [1, 1, 2]


def test_nanogpts_tokens_without_a_meta_are_gpt2s(tmp_path):
    corpus = load_corpus(save_tokens(tmp_path / "data", None, [50256, 0], [1]))
    assert corpus.tokenizer == GPT2Tokenizer()
    assert corpus.train.read(0, 2).tolist() == [50256, 0]


def test_a_change_of_nanogpts_tokens_is_noticed(tmp_path):
    folder = save_tokens(tmp_path / "data", "ab", [0, 1, 1], [1])
    before = load_corpus(folder).identity()
    assert load_corpus(folder).change_since(before) is None
    np.array([0, 1, 0], np.uint16).tofile(folder / "train.bin")
    assert load_corpus(folder).change_since(before) == "its tokens of train are others"


@pytest.mark.parametrize(
    ("val", "words"),
    [(b"", "has 0 bytes"), (b"abc", "has 3 bytes, no whole number"), (b"\2\0", "has the token 2, and its meta")],
)
def test_nanogpts_tokens_that_make_no_sense_are_refused(tmp_path, val, words):
    folder = save_tokens(tmp_path / "data", "ab", [0, 1], [1])
    (folder / "val.bin").write_bytes(val)
    with pytest.raises(UserError, match=f"val.bin: {words}"):
        load_corpus(folder)
