"""What every engine is held to: the eager model in float64."""

from bench.backends import eager

FACTORY = f"{__name__}:Reference"


class Reference(eager.Engine):
    """Eager in float64; its logits are float64 [B, T, V]. Not an engine: it is never timed."""

    summary = "PyTorch eager in float64"
    dtype = "float64"
    arithmetic = "float64"
