"""Show how far a long job is: a bar on a terminal, and a plain line a minute in a pipe or a file."""

import io
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from tqdm import tqdm

LINE_EVERY_S = 60.0


def progress_bar(iterable: Iterable[Any] | None = None, **settings: Any) -> tqdm:
    """Return tqdm's bar with these settings, on stderr; where stderr is no terminal, one that writes plain lines.

    Close it, by `with` or at the end of its loop, before an error is printed, or the error stands behind the bar.
    """
    on_terminal = sys.stderr is not None and sys.stderr.isatty()
    kind = tqdm if on_terminal else PlainProgress
    return kind(iterable, **settings)


class PlainProgress(tqdm):
    """Writes a line a minute, and one when it is closed if it would then stay on the screen.

    clock: the time in seconds, of any beginning.
    """

    def __init__(
        self, iterable: Iterable[Any] | None = None, clock: Callable[[], float] = time.monotonic, **settings: Any
    ):
        self.clock, self.said_s = clock, clock()
        super().__init__(iterable, **settings, disable=sys.stderr is None)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Write a line if the last one is a minute old. tqdm calls this whenever it would draw its bar."""
        if self.clock() - self.said_s >= LINE_EVERY_S:
            self._write_line()
        return True

    def clear(self, nolock: bool = False) -> None:
        """Leave alone what is written: there is no bar to remove."""

    def close(self) -> None:
        """Write the last line."""
        if not self.disable:
            if self.leave:
                self._write_line()
            self.said_s, self.fp = float("inf"), io.StringIO()  # tqdm's own end of a line is not wanted
        super().close()

    def _write_line(self) -> None:
        self.said_s = self.clock()
        shown = self.format_dict | {"ncols": None, "bar_format": _plain_format(self.bar_format, self.total)}
        self.fp.write(self.format_meter(**shown).rstrip() + "\n")
        self.fp.flush()


def _plain_format(bar_format: str | None, total: float | None) -> str:
    """Return what a line shows: the given format without its bar, or all that tqdm tells by default."""
    if bar_format is not None:
        return " ".join(bar_format.replace("{bar}", "").split())
    if total is None:
        return "{desc}: {n_fmt} {unit} [{elapsed}, {rate_fmt}{postfix}]"
    return "{desc}: {percentage:.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
