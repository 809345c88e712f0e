"""Linear layers by oneDNN against the definition in float64, values and gradients."""

import pytest
import torch
from torch import nn

from gpt import onednn
from gpt.config import GPTConfig
from gpt.model import GPT, loss_of

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(1, 1), (3, 17), (12, 64)])
def test_linear_and_its_gradients(rows: tuple[int, int], bias: bool) -> None:
    ours, exact = nn.Linear(48, 33, bias=bias), nn.Linear(48, 33, bias=bias).double()
    exact.load_state_dict(ours.state_dict())
    onednn.use_onednn(ours)
    x = torch.randn(*rows, 48, requires_grad=True)
    y, upstream = x.detach().double().requires_grad_(), torch.randn(*rows, 33)
    ours(x).backward(upstream)
    exact(y).backward(upstream.double())
    torch.testing.assert_close(ours(x).double(), exact(y), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-5, atol=1e-5)
    for found, expected in zip(ours.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(found.grad.double(), expected.grad, rtol=1e-4, atol=1e-4)


def test_a_model_has_the_same_loss_and_gradients() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=16))
    ids = torch.randint(11, (3, 8))
    gradients = []
    for _ in range(2):
        model.zero_grad()
        loss_of(model(ids), ids).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        onednn.use_onednn(model)
    for plain, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


def test_it_serves_products_of_a_linear_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    before = model[1].forward
    onednn.use_onednn(model)
    assert model[1].forward == before
    assert type(model(torch.randn(2, 4)).grad_fn.next_functions[0][0]).__name__ == "_LinearBackward"
