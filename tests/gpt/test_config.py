from dataclasses import FrozenInstanceError

import pytest

from gpt.cli import UserError
from gpt.config import GPTConfig, config_from_json


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
        ("activation", "swish"),
        ("n_inner", 0),
        ("n_inner", 64.0),
        ("layer_norm_epsilon", -1e-5),
        ("layer_norm_epsilon", float("inf")),
        ("scale_attn_weights", 1),
        ("scale_attn_by_inverse_layer_idx", None),
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


def test_an_mlp_of_four_times_the_width_is_gpt2s_however_it_is_written():
    assert GPTConfig(n_embd=96, n_head=4, n_inner=384) == GPTConfig(n_embd=96, n_head=4)
    assert GPTConfig(n_embd=96, n_head=4).mlp_width == 384
    assert GPTConfig(n_embd=96, n_head=4, n_inner=100).mlp_width == 100


def test_scores_are_scaled_as_the_two_fields_say():
    def scales(**settings):
        config = GPTConfig(n_embd=64, n_head=4, **settings)
        return config.attention_scale(0), config.attention_scale(3)

    assert scales() == (0.25, 0.25)
    assert scales(scale_attn_weights=False) == (1.0, 1.0)
    assert scales(scale_attn_by_inverse_layer_idx=True) == (0.25, 0.0625)
    assert scales(scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True) == (1.0, 0.25)


def test_a_description_of_before_a_field_was_added_has_its_default():
    assert config_from_json({"n_embd": 48, "n_head": 3, "model": "gpt"}) == GPTConfig(n_embd=48, n_head=3)
