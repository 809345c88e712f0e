"""Formats numbers for readers. Imports the standard library only."""


def milliseconds(value: float) -> str:
    """Format a time in ms with about three significant digits, without its unit."""
    if value < 0.1:
        return f"{value:.2g}"
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:,.{digits}f}"


def duration(value_ms: float) -> str:
    """Format a time with its unit: ms, or s from ten seconds on."""
    return f"{milliseconds(value_ms)} ms" if value_ms < 10_000 else f"{value_ms / 1000:.1f} s"


def percent(value: float) -> str:
    """Format a percentage: no decimals from 10 on, one below."""
    return f"{value:.0f} %" if value >= 10 else f"{value:.1f} %"


def size(value_bytes: float) -> str:
    """Format bytes in MB with about three significant digits, or in GB from 10 GB on."""
    megabytes = value_bytes / 1e6
    return f"{milliseconds(megabytes)} MB" if megabytes < 10_000 else f"{megabytes / 1000:.1f} GB"


def times(ratio: float) -> str:
    """Format a ratio with two decimals, or two significant digits below 0.1."""
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}"


def factor(ratio: float) -> str:
    """Format a factor: no decimals from 10 on, one below."""
    return f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.1f}"


def shape_name(shape: tuple[int, int]) -> str:
    """Format (B, T) as `B×T`."""
    return f"{shape[0]}×{shape[1]}"
