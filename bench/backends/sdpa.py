"""Runs eager PyTorch with its fused attention, scaled_dot_product_attention."""

from bench.backends import eager


class Engine(eager.Engine):
    """Differs from eager in the attention alone."""

    summary = "PyTorch, one operator after the other, its fused attention; a KV cache in place"
    attention = "sdpa"
