import json
import subprocess
import sys

import numpy as np
import pytest

from gpt.cli import UserError
from gpt.config import GPTConfig
from gpt.tokenizer import CharTokenizer, NoTokenizer, check_ids, tokenizer_from_json

TEXT = 'héllo wörld\n\t☃ "q"\\'


def test_round_trip():
    tokenizer = CharTokenizer.of_text(TEXT)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_ids_are_places_in_the_sorted_characters():
    assert CharTokenizer.of_text("cabba").encode("abc") == [0, 1, 2]


@pytest.mark.parametrize("tokenizer", [CharTokenizer.of_text(TEXT), NoTokenizer()])
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
    "found", [{}, {"kind": "bpe"}, {"kind": "characters"}, {"kind": "characters", "characters": 3}, []]
)
def test_a_foreign_description_is_refused(found):
    with pytest.raises(UserError, match="not a tokenizer of ours"):
        tokenizer_from_json(found)


def test_random_weights_have_no_text():
    with pytest.raises(UserError, match="no tokenizer"):
        NoTokenizer().encode("a")
    with pytest.raises(UserError, match="no tokenizer"):
        NoTokenizer().decode([1])


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
