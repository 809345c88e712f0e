"""PyTorch with its fused attention, scaled_dot_product_attention, and else as eager."""

from bench.backends import eager


class Engine(eager.Engine):
    """Eager but for the attention."""

    summary = "PyTorch, one operator after the other, its fused attention; a KV cache in place"
    attention = "sdpa"
