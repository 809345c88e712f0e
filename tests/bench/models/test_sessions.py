from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.models import sessions
from bench.models.sessions import open_as
from gpt.cli import UserError


def test_a_session_of_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "open_session", lambda model, threads: threads)
    model = SimpleNamespace(path=Path("tvm-llvm-O3"))
    assert open_as(int, model, 2) == 2
    with pytest.raises(UserError, match="tvm-llvm-O3: gives a int, and what runs it needs a str"):
        open_as(str, model, 2)
