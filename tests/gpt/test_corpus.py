import string

import pytest
import torch

from gpt.cli import UserError
from gpt.corpus import load_corpus, random_batches, split, standard_library


def test_default_is_the_standard_library():
    corpus = load_corpus()
    assert "standard library" in corpus.name
    assert "def " in corpus.text
    assert 1_000_000 < len(corpus.text) <= 4_000_000


def test_default_is_the_same_each_time_and_capped():
    assert standard_library(limit=50_000) == standard_library(limit=50_000)
    assert len(standard_library(limit=50_000).text) <= 50_000


def test_default_keeps_few_characters_and_counts_the_others():
    corpus = load_corpus()
    assert set(corpus.text) <= set(string.printable) - set("\r\v\f")
    assert corpus.dropped > 0


def test_a_python_without_sources_is_a_users_error(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match="without sources; give a text file with --corpus"):
        load_corpus()


def test_a_file_is_kept_whole(tmp_path):
    (tmp_path / "text.txt").write_text("Grüße ☃\r\nzwei", encoding="utf-8", newline="")
    corpus = load_corpus(tmp_path / "text.txt")
    assert corpus.text == "Grüße ☃\nzwei"
    assert corpus.dropped == 0


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"absent.txt: cannot be read \(No such file"):
        load_corpus(tmp_path / "absent.txt")


def test_a_folder_is_no_corpus(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load_corpus(tmp_path)


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match=r"empty.txt: is empty"):
        load_corpus(tmp_path / "empty.txt")


def test_a_binary_file_is_named_with_its_first_bad_byte(tmp_path):
    (tmp_path / "image.png").write_bytes(b"ab\xff\xfe")
    with pytest.raises(UserError, match=r"image.png: not UTF-8 text \(byte 2\)"):
        load_corpus(tmp_path / "image.png")


def test_split_is_90_to_10_in_order():
    train, val = split(range(100), 5, "x")
    assert train.tolist() == list(range(90))
    assert val.tolist() == list(range(90, 100))


def test_a_corpus_too_short_for_a_block_says_how_long_it_must_be():
    with pytest.raises(UserError, match="x: 640 tokens are too few for block_size=64; give at least 641"):
        split(range(640), 64, "x")
    split(range(641), 64, "x")


def test_targets_are_the_inputs_one_later():
    inputs, targets = random_batches(torch.arange(50), 8, 4, seed=1)()
    assert inputs.shape == targets.shape == (4, 8)
    assert inputs.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)


def test_batches_reach_both_ends():
    draw = random_batches(torch.arange(6), 4, 64, seed=1)
    inputs, targets = draw()
    assert int(inputs.min()) == 0
    assert int(targets.max()) == 5


def test_batches_depend_on_the_seed_alone():
    first, again, other = (random_batches(torch.arange(500), 8, 4, seed) for seed in (1, 1, 2))
    torch.manual_seed(0)
    batches = [first()[0], first()[0]]
    torch.manual_seed(7)
    assert torch.equal(batches[0], again()[0])
    assert torch.equal(batches[1], again()[0])
    assert not torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], other()[0])
