import pytest
import torch

from gpt.cli import UserError
from gpt.config import GPTConfig
from gpt.model import GPT
from gpt.optimizer import autocast, learning_rate_at, optimizer_of, precision_of
from gpt.train_config import TrainConfig
from gpt.zoo import build_model

CPU = torch.device("cpu")


def test_decay_spares_gains_and_biases(config):
    model = GPT(config)
    decayed, spared = optimizer_of(model, TrainConfig()).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert {parameter.dim() for parameter in decayed["params"]} == {2}
    assert {parameter.dim() for parameter in spared["params"]} == {1}
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))


def test_a_bigram_has_its_table_alone():
    (group,) = optimizer_of(build_model(GPTConfig.bigram(7, 4)), TrainConfig()).param_groups
    assert len(group["params"]) == 1


def test_learning_rate_rises_then_falls_by_half_a_cosine():
    config = TrainConfig(max_steps=300, warmup_steps=100, learning_rate=1e-3, min_lr=1e-4)
    rates = [learning_rate_at(step, config) for step in range(301)]
    assert rates[:101] == sorted(rates[:101])
    assert rates[100] == max(rates) == 1e-3
    assert rates[200] == pytest.approx((1e-3 + 1e-4) / 2)
    assert rates[300] == pytest.approx(1e-4)
    assert rates[0] > 0


def test_learning_rate_stays_low_after_decay_steps():
    short, long = (TrainConfig(max_steps=steps, decay_steps=300) for steps in (50, 900))
    assert [learning_rate_at(step, short) for step in range(50)] == [learning_rate_at(step, long) for step in range(50)]
    assert learning_rate_at(299, long) > learning_rate_at(300, long) == learning_rate_at(899, long) == 1e-4


def test_precision_is_fp32_on_a_cpu():
    assert precision_of(TrainConfig(), CPU) == "fp32"


def test_tf32_needs_a_gpu():
    with pytest.raises(UserError, match="--precision tf32: needs a CUDA GPU"):
        precision_of(TrainConfig(precision="tf32"), CPU)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_autocast_computes_in_the_precision(precision, dtype):
    with autocast(precision, CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
