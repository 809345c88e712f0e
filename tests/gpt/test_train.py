import math
import signal
from dataclasses import replace

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from gpt.checkpoint import load_checkpoint, save_checkpoint
from gpt.cli import UserError
from gpt.corpus import load_corpus, random_batches, split
from gpt.model import GPT, loss_of
from gpt.tokenizer import CharTokenizer
from gpt.train import PRESETS, TrainConfig, _optimizer_of, _update, learning_rate_at, parse, sample, train


def test_learns(trained):
    losses = trained.losses
    assert losses["step"] == [0, 30, 60]
    assert trained.step == 60
    assert losses["val"][0] == pytest.approx(math.log(28), rel=0.05)
    assert losses["val"][-1] < 0.6 * losses["val"][0]


def test_the_same_seed_trains_the_same(tmp_path, train_config, trained):
    again = train(train_config)
    assert save_checkpoint(tmp_path / "a.pt", trained) == save_checkpoint(tmp_path / "b.pt", again)


def test_another_seed_trains_another(train_config, trained):
    other = train(replace(train_config, seed=1))
    assert other.losses["val"] != trained.losses["val"]


def test_losses_are_those_of_the_returned_weights_without_dropout(train_config, capsys):
    config = replace(train_config, dropout=0.3, max_steps=5)
    checkpoint = train(config)
    text = load_corpus(config.corpus).text
    val = split(CharTokenizer.of_text(text).encode(text), config.block_size, "text")[1]
    draw = random_batches(val, config.block_size, config.batch_size, config.seed + 1)
    model = checkpoint.build("sdpa")
    losses = [
        loss_of(model(inputs), targets).item() for inputs, targets in (draw() for _ in range(config.eval_batches))
    ]
    assert checkpoint.losses["val"][-1] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert f"val loss {checkpoint.losses['val'][-1]:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize(("learning_rate", "grad_clip"), [(2.0, 1e-3), (0.5, 1e-2)])
def test_an_update_is_as_long_as_rate_and_clip_allow(config, learning_rate, grad_clip):
    model = GPT(config)
    before = parameters_to_vector(model.parameters()).detach()
    draw = random_batches(torch.arange(11).repeat(5), 8, 2, seed=1)
    _update(model, torch.optim.SGD(model.parameters()), draw, learning_rate, grad_clip)
    moved = (parameters_to_vector(model.parameters()).detach() - before).norm().item()
    assert moved == pytest.approx(learning_rate * grad_clip, rel=1e-2)


def test_stops_at_its_minutes(train_config):
    stopped = train(replace(train_config, max_steps=10**9, minutes=0.5 / 60))
    assert 0 < stopped.step < 10**6
    assert stopped.losses["step"][-1] == stopped.step


def test_a_diverged_run_is_a_users_error(train_config):
    with pytest.raises(UserError, match="training diverged; lower --learning-rate"):
        train(replace(train_config, learning_rate=1e30, grad_clip=0.0))


def test_sample_is_text_of_the_vocabulary(trained):
    text = sample(trained, tokens=30, seed=1)
    assert len(text) == 30
    assert set(text) <= set(trained.tokenizer["characters"])


def test_decay_spares_gains_and_biases(config, train_config):
    model = GPT(config)
    decayed, spared = _optimizer_of(model, train_config).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert {parameter.dim() for parameter in decayed["params"]} == {2}
    assert {parameter.dim() for parameter in spared["params"]} == {1}
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))


def test_learning_rate_rises_then_falls_by_half_a_cosine():
    config = TrainConfig(max_steps=300, warmup_steps=100, learning_rate=1e-3, min_lr=1e-4)
    rates = [learning_rate_at(step, config) for step in range(301)]
    assert rates[:101] == sorted(rates[:101])
    assert rates[100] == max(rates) == 1e-3
    assert rates[200] == pytest.approx((1e-3 + 1e-4) / 2)
    assert rates[300] == pytest.approx(1e-4)
    assert rates[0] > 0


def test_demo_is_nanogpts_cpu_recipe():
    demo = parse([])
    model = demo.model_config(65)
    assert (model.n_layer, model.n_head, model.n_embd, model.block_size, model.dropout) == (4, 4, 128, 64, 0.0)
    assert (demo.batch_size, demo.learning_rate, demo.min_lr, demo.beta2, demo.warmup_steps) == (
        12,
        1e-3,
        1e-4,
        0.99,
        100,
    )


def test_shakespeare_char_is_nanogpts_gpu_recipe():
    config = parse(["shakespeare-char"])
    assert GPT(config.model_config(65)).parameter_count() == 10_745_088
    assert (config.batch_size, config.dropout, config.max_steps) == (64, 0.2, 5000)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_takes_overrides(preset):
    expected = replace(PRESETS[preset][1], n_layer=3, max_steps=7, bias=True)
    assert parse([preset, "--max-steps", "7", "--n-layer", "3", "--bias"]) == expected


def test_overrides_without_a_preset_are_the_demos():
    assert parse(["--max-steps", "7"]) == replace(PRESETS["demo"][1], max_steps=7)


def test_vocabulary_is_no_flag(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(["tiny", "--vocab-size", "3"])
    assert exit_.value.code == 2
    assert "--vocab-size" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_steps", 0),
        ("batch_size", 0),
        ("learning_rate", float("nan")),
        ("min_lr", 1.0),
        ("beta2", 1.0),
        ("grad_clip", -1.0),
        ("threads", 0),
        ("minutes", 0.0),
        ("seed", 2**62),
        ("n_layer", 0),
        ("dropout", 1.0),
    ],
)
def test_a_bad_value_names_field_and_value(field, value):
    with pytest.raises(UserError, match=f"{field}={value}: must be"):
        TrainConfig(**{field: value})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_an_absent_gpu_is_a_users_error(train_config):
    with pytest.raises(UserError, match="no CUDA GPU"):
        train(replace(train_config, device="cuda"))


def test_command_trains_and_says_where_the_checkpoint_is(run, tmp_path):
    done = run("gpt.train", "tiny", "--max-steps", 20, "-o", "out/ckpt.pt", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "standard library" in lines[0]
    assert lines[2].startswith("step     0: train loss")
    assert "sample:" in lines
    assert lines[-1] == "checkpoint: out/ckpt.pt"
    assert "20/20" in done.stderr
    assert load_checkpoint(tmp_path / "out" / "ckpt.pt").step == 20


def test_interrupted_command_keeps_the_old_checkpoint_and_nothing_else(start, tmp_path, trained):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored, and that is inherited
    sha256 = save_checkpoint(tmp_path / "ckpt.pt", trained)
    with start("gpt.train", "tiny", "--max-steps", 10**6, "--minutes", 1, "-o", "ckpt.pt") as process:
        while "step     0" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        stderr = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]
    assert load_checkpoint(tmp_path / "ckpt.pt").sha256 == sha256


def test_an_unwritable_output_is_found_before_training(run):
    done = run("gpt.train", "tiny", "--max-steps", 10**9, "-o", "/dev/null/ckpt.pt")
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot write /dev/null/ckpt.pt")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
