"""Faults planted in a trained model are found by the checks of the bench, in every precision that can show them.

The engine is eager PyTorch in the precision, or, in int8 and int4, the model with weights and activations rounded as
TVM's kernels round them; then one thing in it is made wrong. A few faults are smaller than what bfloat16 or 8 bits
change by themselves, and no check of logits can find those there: float32 finds them all.
"""

import math
from collections.abc import Callable, Collection
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.backends.tvm import Engine as Tvm
from bench.correctness.agreement import PRECISIONS as FORMATS
from bench.correctness.agreement import Agreement, Errors, compare_logits, odd_shapes, random_ids
from bench.correctness.reference import allowed_of, in_float64, round_weights, round_while_running
from bench.correctness.rounding import Rounding
from gpt.checkpoint import Checkpoint, load_checkpoint
from gpt.model import GPT, LayerNorm
from gpt.train import main as train

pytestmark = pytest.mark.slow

Fault = Callable[[GPT], None]
PRECISIONS = ("fp32", "bf16", "int8", "int4")
SEEDS = 3  # draws of ids for each


def multiply_a_weight(model: GPT) -> None:
    """Make one weight of every matrix 1 % larger."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight[layer.out_features // 2, layer.in_features // 3] *= 1.01


def multiply_a_matrix(model: GPT) -> None:
    """Make every matrix 1 % larger, as a wrong scale would."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight *= 1.01


def take_the_other_gelu(model: GPT) -> None:
    for block in model.transformer.h:
        block.mlp.activation = nn.GELU()


def set_epsilon(epsilon: float, model: GPT) -> None:
    def forward(norm: LayerNorm, x: Tensor) -> Tensor:
        return F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, eps=epsilon)

    for layer in model.modules():
        if isinstance(layer, LayerNorm):
            layer.forward = partial(forward, layer)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float,
    scale: float,
    *,
    later: int = 0,
    skips_last_key: bool = False,
    factor: float = 1.0,
) -> Tensor:
    """Attend with a fault. later: how many keys behind its own a query sees; one fewer if -1."""
    scores = factor * scale * q @ k.transpose(-2, -1)  # [B, nh, T, T]
    T = scores.shape[-1]
    mask = torch.full((T, T), -math.inf, dtype=q.dtype).triu(1 + later)
    mask[0, 0] = 0  # a row without any key has no softmax
    if skips_last_key and T > 1:
        mask[-1, -1] = -math.inf
    return F.softmax(scores + mask, -1) @ v


def attend_wrongly(layers: slice, model: GPT, **how: float) -> None:
    for block in list(model.transformer.h)[layers]:
        block.attn.attend = partial(attend, **how)


def zero_the_last_row(model: GPT) -> None:
    model.lm_head.weight[-1] = 0


def shift_positions(model: GPT) -> None:
    model.transformer.wpe.weight.copy_(model.transformer.wpe.weight.roll(1, 0))


def swap(first: tuple[int, int], second: tuple[int, int], model: GPT) -> None:
    """Swap the parts of two heads in the first layer, each a part (q, k, v are 0, 1, 2) and a head."""
    attention, config = model.transformer.h[0].attn.c_attn, model.config
    a, b = (
        slice(part * config.n_embd + head * config.head_size, part * config.n_embd + (head + 1) * config.head_size)
        for part, head in (first, second)
    )
    for tensor in (attention.weight, attention.bias):
        tensor[a], tensor[b] = tensor[b].clone(), tensor[a].clone()


def drop_a_bias(model: GPT) -> None:
    model.transformer.h[0].mlp.c_fc.bias.zero_()


def round_products(model: GPT) -> None:
    """Compute products of bfloat16, as a kernel of another precision would."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(lambda _, inputs: tuple(x.bfloat16().to(x.dtype) for x in inputs))


ALL, FIRST, LAST = slice(None), slice(1), slice(-1, None)
# Each fault with the precisions in which it is larger than what the precision itself changes.
FAULTS: dict[str, tuple[Fault, Collection[str]]] = {
    "a weight of every matrix is 1 % larger": (multiply_a_weight, ("fp32",)),
    "every matrix is 1 % larger": (multiply_a_matrix, ("fp32",)),
    "GELU of the other kind": (take_the_other_gelu, ("fp32",)),
    "epsilon is 1e-3": (partial(set_epsilon, 1e-3), PRECISIONS),
    "epsilon is 1e-4": (partial(set_epsilon, 1e-4), ("fp32",)),
    "a later key is seen": (partial(attend_wrongly, ALL, later=1), PRECISIONS),
    "a query's own key is not seen": (partial(attend_wrongly, ALL, later=-1), PRECISIONS),
    "the last key is skipped in the first layer": (partial(attend_wrongly, FIRST, skips_last_key=True), PRECISIONS),
    # In fewer bits it depends on what the model learnt, of a corpus that differs by Python's version, if this shows.
    "the last key is skipped in the last layer": (partial(attend_wrongly, LAST, skips_last_key=True), ("fp32",)),
    "the last row of the head is zero": (zero_the_last_row, PRECISIONS),
    "positions are shifted": (shift_positions, PRECISIONS),
    "q and k of a head are swapped": (partial(swap, (0, 0), (1, 0)), PRECISIONS),
    "k and v of a head are swapped": (partial(swap, (1, 0), (2, 0)), PRECISIONS),
    "v of two heads is swapped": (partial(swap, (2, 0), (2, 1)), PRECISIONS),
    "a bias is dropped": (drop_a_bias, PRECISIONS),
    "scores are 1 % larger": (partial(attend_wrongly, ALL, factor=1.01), ("fp32",)),
    "scores are 0.1 % larger": (partial(attend_wrongly, ALL, factor=1.001), ("fp32",)),
    "products are of bfloat16": (round_products, ("fp32",)),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Train a model with biases for some seconds, until attention, biases and activations are of their usual size."""
    path = tmp_path_factory.mktemp("planted") / "ckpt.pt"
    options = "tiny --bias --block-size 70 --n-embd 64 --n-head 4 --max-steps 400 --learning-rate 3e-3 --seed 1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["gpt.train", *options.split(), "-o", str(path)])
        train()
    return load_checkpoint(path)


@pytest.fixture(scope="module")
def allowed(trained: Checkpoint) -> Callable[[str], list[Errors]]:
    """Measure what is allowed in a precision, for each seed; once."""

    @cache
    def measure(precision: str) -> list[Errors]:
        return [allowed_of(trained, precision, rounding_of(precision), seed) for seed in range(SEEDS)]

    return measure


def rounding_of(precision: str) -> Rounding | None:
    return next(each for each in Tvm.variants.values() if each.precision == precision).rounding


def engine_of(checkpoint: Checkpoint, precision: str, plant: Fault) -> nn.Module:
    """Build the model of an engine in a precision, with a fault planted before its weights are rounded."""
    model, rounding = checkpoint.build(attention="explicit"), rounding_of(precision)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # not the embedding
    with torch.no_grad():
        plant(model)
    if rounding is None:
        return model.to(getattr(torch, FORMATS[precision].dtype))
    model.double()
    round_weights(model, rounding)
    round_while_running(model, rounding)
    return model


def check(checkpoint: Checkpoint, precision: str, plant: Fault, allowed: list[Errors]) -> list[Agreement]:
    """Compare an engine as the bench does, at the shapes that are always checked, with fresh ids for each seed."""
    judge, engine = in_float64(checkpoint, rounding_of(precision)), engine_of(checkpoint, precision, plant)
    found = []
    for seed, errors in enumerate(allowed):
        for B, T in odd_shapes(checkpoint.config):
            ids = random_ids(checkpoint.config, B, T, seed + 100)
            with torch.inference_mode():
                right, logits = judge(torch.from_numpy(ids)), engine(torch.from_numpy(ids)).float()
            found.append(compare_logits(right.numpy(), logits.numpy(), errors))
    return found


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_right_agrees(trained: Checkpoint, allowed: Callable[[str], list[Errors]], precision: str) -> None:
    for agreement in check(trained, precision, lambda model: None, allowed(precision)):
        assert agreement.agrees, agreement.reason
        assert agreement.share_of_allowed < 0.8


@pytest.mark.parametrize(
    ("fault", "precision"), [(name, each) for name, (_, shown) in FAULTS.items() for each in shown]
)
def test_a_fault_is_found(
    trained: Checkpoint, allowed: Callable[[str], list[Errors]], fault: str, precision: str
) -> None:
    plant, _ = FAULTS[fault]
    found, shapes = check(trained, precision, plant, allowed(precision)), len(odd_shapes(trained.config))
    for seed in range(SEEDS):
        of_seed = found[seed * shapes : (seed + 1) * shapes]
        assert not all(agreement.agrees for agreement in of_seed), of_seed
