"""Read a command's settings from its command line."""

import io
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import tyro

from gpt.cli import UserError


def parse_settings(form: Any, **how: Any) -> Any:
    """Return the settings that the command line asks for, as `tyro.cli(form, **how)` does for a dataclass.

    A value that the dataclass refuses raises its UserError, which a command shows in one line as any other; by itself
    tyro would put it in a box.
    """
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            return tyro.cli(form, **how)
    except SystemExit as end:
        error = end.__context__
        while error is not None and not isinstance(error, UserError):
            error = error.__context__
        if error is not None:
            raise error from None
    return tyro.cli(form, **how)  # it ends again, and shows the help or what tyro says of the mistake
