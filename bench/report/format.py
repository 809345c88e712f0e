"""Numbers as a reader wants them. Standard library only."""


def milliseconds(value: float) -> str:
    """A time in ms with three significant digits or so, without its unit."""
    if value < 0.1:
        return f"{value:.2g}"
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:,.{digits}f}"


def duration(value_ms: float) -> str:
    """A time with its unit: ms, or from ten seconds on s."""
    return f"{milliseconds(value_ms)} ms" if value_ms < 10_000 else f"{value_ms / 1000:.1f} s"


def percent(value: float) -> str:
    """A percentage: whole from 10 on, with one decimal below."""
    return f"{value:.0f} %" if value >= 10 else f"{value:.1f} %"


def size(value_bytes: float) -> str:
    """Bytes in MB, three significant digits or so; from 10 GB on in GB."""
    megabytes = value_bytes / 1e6
    return f"{milliseconds(megabytes)} MB" if megabytes < 10_000 else f"{megabytes / 1000:.1f} GB"


def times(ratio: float) -> str:
    """A ratio with two decimals, or two significant digits below 0.1."""
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}"


def factor(ratio: float) -> str:
    """How many times: whole from 10 on, with one decimal below."""
    return f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.1f}"


def shape_name(shape: tuple[int, int]) -> str:
    """(B, T) as `B×T`."""
    return f"{shape[0]}×{shape[1]}"
