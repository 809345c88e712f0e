"""Count what a model costs to run from its shape alone. FLOPs: a multiply-add is two."""

from gpt.config import GPTConfig


def matmul_parameters(config: GPTConfig) -> int:
    """Count the weights that multiply a token: four C × C, two C × n_inner a layer, and the head; none in a bigram."""
    if config.model == "bigram":
        return 0
    return config.n_embd * (config.n_layer * (4 * config.n_embd + 2 * config.mlp_width) + config.vocab_size)


def parameter_count(config: GPTConfig) -> int:
    """Count the numbers that are learned, as `GPT.parameter_count` does, without building the model."""
    L, C, V, n_inner = config.n_layer, config.n_embd, config.vocab_size, config.mlp_width
    if config.model == "bigram":
        return V * V
    biases = L * (7 * C + n_inner) + C if config.bias else 0  # of four Linears, two LayerNorms a layer, and the last
    heads = 1 if config.tied_head else 2
    return L * (4 * C**2 + 2 * C * n_inner) + (2 * L + 1) * C + biases + heads * V * C + config.block_size * C


def prefill_flops_per_token(config: GPTConfig, T: int) -> float:
    """Count FLOPs of the forward pass over T tokens, by T: 2·N for the weights and 2·L·C·(T + 1) for attention.

    A query meets (T + 1)/2 keys on average, in two products of width C. Norms, softmax and the activation are left out
    (table 1 of https://arxiv.org/abs/2001.08361, which rounds T + 1 to T).
    """
    return 2 * matmul_parameters(config) + 2 * config.n_layer * config.n_embd * (T + 1)


def decode_flops_per_token(config: GPTConfig, T: int) -> int:
    """Count FLOPs of the T-th token alone, the others being in a KV cache: 2·N + 4·L·C·T."""
    return 2 * matmul_parameters(config) + 4 * config.n_layer * config.n_embd * T


def training_flops_per_token(config: GPTConfig, T: int) -> int:
    """Count FLOPs of forward and backward for one token of a sequence of T: 6·N + 12·L·C·T.

    Appendix B of https://arxiv.org/abs/2204.02311, with N the weights of matrix products; attention counts in full,
    although half of it is masked.
    """
    if config.model == "bigram":
        return 0
    return 6 * matmul_parameters(config) + 12 * config.n_layer * config.n_embd * T
