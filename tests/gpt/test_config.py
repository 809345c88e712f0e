from dataclasses import FrozenInstanceError

import pytest

from gpt.cli import UserError
from gpt.config import GPTConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_size", 0),
        ("vocab_size", -1),
        ("n_layer", 1.5),
        ("n_head", True),
        ("n_embd", "64"),
        ("n_embd", 100),  # no multiple of 12 heads
        ("dropout", 1.0),
        ("dropout", float("nan")),
        ("activation", "tanh"),
        ("bias", 1),
        ("tied_head", "no"),
        ("dropout", False),
        ("vocab_size", 2**31),
    ],
)
def test_a_bad_value_names_field_and_value(field, value):
    with pytest.raises(UserError, match=f"{field}={value!r}: must be"):
        GPTConfig(**{field: value})


def test_a_bad_value_is_a_value_error():
    with pytest.raises(ValueError, match="n_layer=0"):
        GPTConfig(n_layer=0)


def test_is_frozen():
    with pytest.raises(FrozenInstanceError):
        GPTConfig().n_layer = 3


def test_head_size():
    assert GPTConfig(n_embd=96, n_head=4).head_size == 24
