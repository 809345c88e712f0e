"""What a model costs to run, counted from its shape alone."""

from gpt.config import GPTConfig


def matmul_parameters(config: GPTConfig) -> int:
    """Weights that each token is multiplied with: four C × C, two C × 4C a layer, and the head. A bigram has none."""
    if config.model == "bigram":
        return 0
    return 12 * config.n_layer * config.n_embd**2 + config.n_embd * config.vocab_size


def training_flops_per_token(config: GPTConfig, T: int) -> int:
    """FLOPs of forward and backward for one token of a sequence of T: 6·N + 12·L·C·T.

    Appendix B of https://arxiv.org/abs/2204.02311, with N the weights of matrix products; attention counts in full,
    although half of it is masked.
    """
    if config.model == "bigram":
        return 0
    return 6 * matmul_parameters(config) + 12 * config.n_layer * config.n_embd * T
