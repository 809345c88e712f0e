import pytest
import torch

from gpt.checkpoint import save_checkpoint, seeded_checkpoint
from gpt.cli import UserError
from gpt.generate import generate
from gpt.tokenizer import tokenizer_from_json


@pytest.fixture
def model(config):
    return seeded_checkpoint(config).build("sdpa")


def test_greedy_takes_the_likeliest_of_the_last_block(model, config):
    ids = [1, 2, 3]
    for index in generate(model, [1, 2, 3], 20, temperature=0):
        seen = torch.tensor([ids[-config.block_size :]])
        assert index == int(model(seen)[0, -1].argmax())
        ids.append(index)
    assert len(ids) == 23


def test_the_same_seed_draws_the_same(model):
    one, two, other = (list(generate(model, [1], 12, seed=seed)) for seed in (5, 5, 6))
    assert one == two != other


def test_without_a_seed_it_differs(model):
    assert list(generate(model, [1], 30)) != list(generate(model, [1], 30))


def test_top_1_is_greedy(model):
    assert list(generate(model, [1], 12, top_k=1)) == list(generate(model, [1], 12, temperature=0))


def test_top_k_draws_among_k(model):
    likeliest = set(model(torch.tensor([[4]]))[0, -1].topk(3).indices.tolist())
    drawn = {next(generate(model, [4], 1, temperature=100.0, top_k=3, seed=seed)) for seed in range(60)}
    assert drawn == likeliest


def test_a_low_temperature_is_nearly_greedy(model):
    assert list(generate(model, [1], 12, temperature=1e-6)) == list(generate(model, [1], 12, temperature=0))


def test_leaves_the_callers_ids_alone(model):
    ids = [1, 2]
    list(generate(model, ids, 3))
    assert ids == [1, 2]


@pytest.mark.parametrize(
    ("ids", "settings", "message"),
    [
        ([], {}, "no token ids"),
        ([11], {}, "token id 11"),
        ([1], {"tokens": -1}, "tokens=-1"),
        ([1], {"temperature": -0.5}, "temperature=-0.5"),
        ([1], {"temperature": float("nan")}, "temperature=nan"),
        ([1], {"top_k": 0}, "top_k=0"),
        ([1], {"seed": -1}, "seed=-1"),
        ([1], {"seed": 2**70}, "seed=1180591620717411303424"),
    ],
)
def test_bad_settings_are_named_before_the_first_token(model, ids, settings, message):
    with pytest.raises(UserError, match=message):
        generate(model, ids, **({"tokens": 3} | settings))


def test_command_continues_the_prompt(run, tmp_path, trained):
    save_checkpoint(tmp_path / "ckpt.pt", trained)
    done = run("gpt.generate", "ckpt.pt", "--prompt", "the ", "--tokens", 50, "--temperature", 0)
    assert done.returncode == 0, done.stderr
    tokenizer = tokenizer_from_json(trained.tokenizer)
    added = generate(trained.build("sdpa"), tokenizer.encode("the "), 50, temperature=0)
    assert done.stdout == "the " + tokenizer.decode(added) + "\n"


def test_command_with_a_bad_prompt_is_exit_2(run, tmp_path, trained):
    save_checkpoint(tmp_path / "ckpt.pt", trained)
    done = run("gpt.generate", "ckpt.pt", "--prompt", "the §")
    assert done.returncode == 2
    assert done.stderr.startswith("error: the character '§' (place 4)")
    assert done.stderr.count("\n") == 1
