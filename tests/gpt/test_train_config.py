from dataclasses import replace

import pytest

from gpt.cli import UserError
from gpt.train_config import TrainConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_steps", 0),
        ("max_steps", -1),
        ("max_steps", 2**31),
        ("batch_size", 10**30),
        ("learning_rate", float("inf")),
        ("weight_decay", float("nan")),
        ("grad_clip", float("inf")),
        ("minutes", float("inf")),
        ("minutes", float("nan")),
        ("minutes", -1.0),
        ("seed", 2**70),
        ("seed", -1),
        ("block_size", 2**31),
        ("n_embd", 10**30),
        ("batch_size", 0),
        ("micro_batch_size", 0),
        ("learning_rate", float("nan")),
        ("min_lr", 1.0),
        ("beta2", 1.0),
        ("grad_clip", -1.0),
        ("keep_last", 0),
        ("patience", 0),
        ("threads", 0),
        ("minutes", 0),
        ("seed", 2**62),
        ("n_layer", 0),
        ("dropout", 1.0),
    ],
)
def test_a_bad_value_names_field_and_value(field, value):
    with pytest.raises(UserError, match=f"{field}={value}: must be"):
        TrainConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("order", "order='x': must be one of random, sequential, one"),
        ("tokenizer", "tokenizer='x': must be one of characters, gpt2, None"),
        ("precision", "precision='x': must be one of auto, fp32, tf32, bf16, fp16"),
        ("model", "model='x': must be one of gpt, bigram"),
    ],
)
def test_an_unknown_name_is_refused_with_those_that_exist(field, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**{field: "x"})


def test_resume_and_overwrite_exclude_each_other():
    with pytest.raises(UserError, match="choose one"):
        TrainConfig(resume=True, overwrite=True)


def test_a_corpus_can_have_changed_only_where_a_run_goes_on():
    with pytest.raises(UserError, match=r"allow_changed_corpus=True: is of use with resume=True alone; leave it out"):
        TrainConfig(allow_changed_corpus=True)
    assert TrainConfig(allow_changed_corpus=True, resume=True).allow_changed_corpus


def test_a_bigrams_shape_is_its_own():
    config = replace(TrainConfig(), model="bigram").model_config(65)
    assert (config.model, config.n_layer, config.vocab_size, config.block_size) == ("bigram", 0, 65, 64)


def test_the_run_is_beside_the_output(tmp_path):
    assert TrainConfig(output=tmp_path / "ckpt.pt").folder == tmp_path / "ckpt-run"
