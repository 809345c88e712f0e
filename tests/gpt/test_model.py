import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.export import Dim

from gpt.attention import ATTENTIONS
from gpt.checkpoint import seeded_checkpoint
from gpt.cli import UserError
from gpt.config import GPTConfig
from gpt.model import GPT, LayerNorm, loss_of

NANO = GPTConfig(block_size=256, vocab_size=65, n_layer=6, n_head=6, n_embd=384, bias=False)


def some_ids(config: GPTConfig, B: int, T: int) -> torch.Tensor:
    return torch.randint(config.vocab_size, (B, T), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def nano() -> GPT:
    torch.manual_seed(0)
    return GPT(NANO).eval()


def test_parameter_count_is_nanogpts(nano):
    assert nano.parameter_count() == 10_745_088


def test_state_dict_has_gpt2s_names(nano):
    layer = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
    names = [f"transformer.h.{i}.{part}.weight" for i in range(6) for part in layer]
    ends = ["transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight", "lm_head.weight"]
    assert set(nano.state_dict()) == {*names, *ends}


def test_loss_at_initialisation_is_that_of_a_guess(nano):
    ids = some_ids(NANO, 4, 65)
    loss = loss_of(nano(ids[:, :-1]), ids[:, 1:])
    assert loss.item() == pytest.approx(math.log(65), rel=0.05)


def test_initialisation_is_gpt2s(nano):
    for name, parameter in nano.named_parameters():
        if parameter.dim() == 1:
            assert bool((parameter == 1).all())
        else:
            std = 0.02 / math.sqrt(2 * 6) if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.03), name


def test_biases_begin_at_zero(config):
    biases = [parameter for name, parameter in GPT(config).named_parameters() if name.endswith("bias")]
    assert len(biases) == 2 * 6 + 1
    assert all(bool((bias == 0).all()) for bias in biases)


def test_head_is_tied_to_the_embedding(config):
    model = GPT(config)
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu"])
@pytest.mark.parametrize("T", [1, 5, 16])
def test_explicit_attention_equals_sdpa(config, activation, T):
    checkpoint = seeded_checkpoint(replace(config, activation=activation))
    ids = some_ids(config, 3, T)
    torch.testing.assert_close(checkpoint.build("explicit")(ids), checkpoint.build("sdpa")(ids), atol=1e-6, rtol=0)


def test_the_two_activations_differ(config):
    ids = some_ids(config, 1, 5)
    tanh, exact = (seeded_checkpoint(replace(config, activation=name)).build()(ids) for name in ("gelu_tanh", "gelu"))
    assert 0 < (tanh - exact).abs().max().item() < 1e-2


@pytest.mark.parametrize("epsilon", [1e-5, 1e-6])
def test_layer_norm_is_its_formula(epsilon):
    norm = LayerNorm(GPTConfig(n_embd=4, n_head=1, layer_norm_epsilon=epsilon))
    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(norm.bias, generator=torch.Generator().manual_seed(1))
    x = 0.003 * torch.tensor([[1.0, 2.0, 3.0, 4.0]])  # of a variance as small as eps
    wanted = (x - x.mean()) / torch.sqrt(x.var(correction=0) + epsilon) * norm.weight + norm.bias
    torch.testing.assert_close(norm(x), wanted)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_later_token_changes_nothing_before_it(config, attention):
    model = seeded_checkpoint(config).build(attention)
    ids = some_ids(config, 2, 10)
    changed = ids.clone()
    changed[:, 6] = (changed[:, 6] + 1) % config.vocab_size
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :6], after[:, :6], atol=1e-6, rtol=0)
    assert bool(((before - after)[:, 6:].abs().amax(dim=-1) > 1e-4).all())


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_dropout_is_for_training_only(config, attention):
    model = seeded_checkpoint(replace(config, dropout=0.5)).build(attention)
    plain = seeded_checkpoint(config).build(attention)
    ids = some_ids(config, 2, 8)
    assert torch.equal(model(ids), plain(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("place", ["attn.dropout", "attn.resid_dropout.p", "mlp.dropout.p", "drop.p"])
def test_dropout_is_in_each_of_its_places(config, place, attention):
    model = seeded_checkpoint(config).build(attention).train()
    ids = some_ids(config, 2, 8)
    assert torch.equal(model(ids), model(ids))
    *path, attribute = place.split(".")
    owner = model.transformer if path[0] == "drop" else model.transformer.h[0]
    setattr(owner.get_submodule(".".join(path)), attribute, 0.5)
    assert not torch.equal(model(ids), model(ids))


def test_last_only_is_the_last_position(config):
    model = seeded_checkpoint(config).build()
    ids = some_ids(config, 2, 7)
    last = model(ids, last_only=True)
    assert last.shape == (2, 1, config.vocab_size)
    torch.testing.assert_close(last, model(ids)[:, -1:])


@pytest.mark.parametrize("T", [0, 17])
def test_a_length_out_of_range_is_a_users_error(config, T):
    with pytest.raises(UserError, match=f"a sequence of {T} tokens.*block_size=16"):
        GPT(config)(torch.zeros(1, T, dtype=torch.long))


def test_an_unknown_attention_names_the_known(config):
    with pytest.raises(UserError, match=r"attention='flash'.*explicit, sdpa"):
        GPT(config, "flash")


def test_learns_one_batch_by_heart(config):
    torch.manual_seed(0)
    model = GPT(config, "sdpa")
    ids = some_ids(config, 4, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        loss = loss_of(model(ids[:, :-1]), ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_exports_with_dynamic_batch_and_length(config, attention):
    model = seeded_checkpoint(config).build(attention)
    shapes = ({0: Dim("B"), 1: Dim("T", max=config.block_size)},)
    exported = torch.export.export(model, (some_ids(config, 2, 8),), dynamic_shapes=shapes).module()
    for B, T in ((1, 1), (3, 5), (2, 16)):
        ids = some_ids(config, B, T)
        torch.testing.assert_close(exported(ids), model(ids), atol=1e-6, rtol=0)


@pytest.mark.slow
def test_sdpa_is_one_node_in_onnx(config):
    shapes = ({0: Dim("B"), 1: Dim("T", max=config.block_size)},)
    program = torch.onnx.export(
        seeded_checkpoint(config).build("sdpa"),
        (some_ids(config, 2, 8),),
        dynamo=True,
        opset_version=23,
        dynamic_shapes=shapes,
        verbose=False,
    )
    nodes = Counter(node.op_type for node in program.model.graph)
    assert (nodes["Attention"], nodes["Gelu"], nodes["LayerNormalization"], nodes["Softmax"]) == (2, 2, 5, 0)
