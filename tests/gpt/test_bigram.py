import math

import pytest
import torch

from gpt.bigram import Bigram
from gpt.checkpoint import load_checkpoint, save_checkpoint, seeded_checkpoint
from gpt.cli import UserError
from gpt.config import GPTConfig
from gpt.generate import generate
from gpt.model import loss_of

CONFIG = GPTConfig.bigram(vocab_size=7, block_size=5)


def test_logits_are_rows_of_the_table():
    model = seeded_checkpoint(CONFIG).build()
    ids = torch.tensor([[3, 0, 6], [1, 1, 2]])
    assert torch.equal(model(ids), model.table.weight[ids])
    assert torch.equal(model(ids, last_only=True), model.table.weight[ids[:, -1:]])


def test_has_one_table():
    model = Bigram(CONFIG)
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == {"table.weight": [7, 7]}
    assert model.parameter_count() == 49


def test_loss_at_initialisation_is_that_of_a_guess():
    ids = torch.randint(7, (4, 6), generator=torch.Generator().manual_seed(0))
    assert loss_of(Bigram(CONFIG)(ids[:, :-1]), ids[:, 1:]).item() == pytest.approx(math.log(7), rel=0.05)


def test_learns_the_frequencies_of_pairs():
    ids = torch.randint(7, (1, 2001), generator=torch.Generator().manual_seed(0))
    config = GPTConfig.bigram(vocab_size=7, block_size=2000)
    model = Bigram(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    for _ in range(200):
        optimizer.zero_grad()
        loss_of(model(ids[:, :-1]), ids[:, 1:]).backward()
        optimizer.step()
    pairs = torch.zeros(7, 7).index_put_((ids[0, :-1], ids[0, 1:]), torch.ones(2000), accumulate=True)
    learned = model.table.weight.softmax(dim=1)
    torch.testing.assert_close(learned, pairs / pairs.sum(dim=1, keepdim=True), atol=1e-3, rtol=0)


@pytest.mark.parametrize("T", [0, 6])
def test_a_length_out_of_range_is_a_users_error(T):
    with pytest.raises(UserError, match=f"a sequence of {T} tokens.*block_size=5"):
        Bigram(CONFIG)(torch.zeros(1, T, dtype=torch.long))


def test_a_checkpoint_brings_it_back(tmp_path):
    checkpoint = seeded_checkpoint(CONFIG)
    save_checkpoint(tmp_path / "ckpt.pt", checkpoint)
    found = load_checkpoint(tmp_path / "ckpt.pt")
    assert found.config == CONFIG
    assert torch.equal(found.build().table.weight, checkpoint.state["table.weight"])


def test_samples_beyond_its_block():
    model = seeded_checkpoint(CONFIG).build()
    drawn = list(generate(model, [2], 12, temperature=0))
    chain = [2]
    for _ in range(12):
        chain.append(int(model.table.weight[chain[-1]].argmax()))
    assert drawn == chain[1:]


@pytest.mark.slow
def test_command_trains_and_samples_one(run, tmp_path, text_file):
    done = run("gpt.train", "bigram", "--corpus", text_file, "--max-steps", 60, "-o", "ckpt.pt", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    checkpoint = load_checkpoint(tmp_path / "ckpt.pt")
    assert checkpoint.config == GPTConfig.bigram(28, checkpoint.config.block_size)
    assert checkpoint.losses["val"][-1] < checkpoint.losses["val"][0] - 0.3
    done = run("gpt.generate", "ckpt.pt", "--tokens", 20, "--seed", 1)
    assert done.returncode == 0, done.stderr
