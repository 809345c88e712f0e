"""Numbers as a reader wants them. Standard library only."""


def milliseconds(value: float) -> str:
    """A time in ms with three significant digits or so, without its unit."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:,.{digits}f}"


def percent(value: float) -> str:
    """A percentage: whole from 10 on, with one decimal below."""
    return f"{value:.0f} %" if value >= 10 else f"{value:.1f} %"


def shape_name(shape: tuple[int, int]) -> str:
    """(B, T) as `B×T`."""
    return f"{shape[0]}×{shape[1]}"
