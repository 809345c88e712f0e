from dataclasses import replace

import pytest

from gpt.checkpoint import save_checkpoint, seeded_checkpoint
from gpt.cli import UserError
from gpt.config import GPTConfig
from gpt.inspect import Parameters, describe, parameter_table
from gpt.model import GPT

CHAR = GPTConfig(block_size=256, vocab_size=65, n_layer=6, n_head=6, n_embd=384, bias=False)


def test_parameters_of_the_char_model():
    table = parameter_table(seeded_checkpoint(CHAR))
    assert table[0] == Parameters("transformer.wte.weight", (65, 384), 1, 24_960)
    assert Parameters("transformer.h.*.attn.c_attn.weight", (1152, 384), 6, 2_654_208) in table
    assert sum(row.total for row in table) == 10_745_088


def test_a_head_of_its_own_is_a_row(config):
    untied = seeded_checkpoint(replace(config, tied_head=False))
    assert parameter_table(untied)[-1] == Parameters("lm_head.weight", (11, 16), 1, 176)
    assert "lm_head.weight" not in [row.name for row in parameter_table(seeded_checkpoint(config))]


def test_every_number_is_in_a_row(config):
    assert sum(row.total for row in parameter_table(seeded_checkpoint(config))) == GPT(config).parameter_count()


def test_a_batch_of_nothing_is_a_users_error(config):
    for batch_size in (0, 2**31):
        with pytest.raises(UserError, match=f"batch_size={batch_size}: must be at least 1 and below"):
            list(describe(seeded_checkpoint(config), batch_size))


@pytest.mark.slow
@pytest.mark.parametrize("config", [CHAR, GPTConfig.bigram(65, 8)])
def test_command_shows_parameters_flops_and_memory(run, tmp_path, config):
    checkpoint = seeded_checkpoint(config)
    save_checkpoint(tmp_path / "ckpt.pt", checkpoint)
    done = run("gpt.inspect", "ckpt.pt", "--batch-size", 2)
    assert done.returncode == 0, done.stderr
    assert f"{sum(row.total for row in parameter_table(checkpoint)):,}" in done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")][:3] == [
        "prefill",
        "decode",
        "training",
    ]
    assert done.stdout.splitlines() == list(describe(checkpoint, 2))
