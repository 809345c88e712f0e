"""Opens a compiled model by the kind of session that the caller needs."""

from typing import TypeVar

from gpt.cli import UserError
from tvm_frontend.artifact import CompiledModel
from tvm_frontend.runtime import open_session

SessionT = TypeVar("SessionT")


def open_as(kind: type[SessionT], model: CompiledModel, threads: int | None = None) -> SessionT:
    """Open a model's session, which must be of a kind; see `tvm_frontend.runtime.open_session`.

    Raises UserError if it is of another, as that of a model with a cache where there must be none.
    """
    session = open_session(model, threads)
    if not isinstance(session, kind):
        raise UserError(f"{model.path}: gives a {type(session).__name__}, and what runs it needs a {kind.__name__}")
    return session
