"""The hashes of a folder's files, kept in a file among them, so that damage and mixed-up files are found."""

import hashlib
import json
from pathlib import Path
from typing import Any

from gpt.cli import UserError
from gpt.files import sha256_file

FILES, OWN = "files_sha256", "sha256"


def seal_folder(folder: Path, name: str, about: dict[str, Any]) -> None:
    """Write the file `name` with what `about` says, the SHA-256 of each other file of the folder, and its own."""
    files = {file.name: sha256_file(file) for file in sorted(folder.iterdir()) if file.name != name}
    (folder / name).write_text(_spelled(about | {FILES: files}), encoding="utf-8")


def check_folder(folder: Path, name: str, remake: str) -> dict[str, Any]:
    """Return what `seal_folder` was told, after every file was read and has the hash that it had then.

    Who opens a file after this reads it anew; `read_folder` is for who can work on the bytes that were checked. remake:
    the command that makes such a folder, for messages. Raises UserError for a folder that is damaged or not of ours.
    """
    about = _read_seal(folder, name, remake)
    for each, sha256 in about.pop(FILES).items():
        if not (folder / each).is_file() or sha256_file(folder / each) != sha256:
            raise _damaged(folder / each, remake)
    return about


def read_folder(folder: Path, name: str, remake: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return the same as `check_folder`, and the content of each file: the very bytes that were checked."""
    about, contents = _read_seal(folder, name, remake), {}
    for each, sha256 in about.pop(FILES).items():
        path = folder / each
        contents[each] = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(contents[each]).hexdigest() != sha256:
            raise _damaged(path, remake)
    return about, contents


def _read_seal(folder: Path, name: str, remake: str) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        raise UserError(f"{folder}: not made by this project (no {name}); make one with {remake}")
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text)
    except (OSError, ValueError) as error:
        raise _damaged(path, remake) from error
    if not isinstance(found, dict) or not isinstance(found.get(FILES), dict):
        raise UserError(f"{path}: holds no hashes of the folder's files; make it again with {remake}")
    found.pop(OWN, None)
    if text != _spelled(found):
        raise _damaged(path, remake)
    return found


def _spelled(content: dict[str, Any]) -> str:
    """Return the one text that says `content`, with its hash."""
    sha256 = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps(content | {OWN: sha256}, indent=1) + "\n"


def _damaged(path: Path, remake: str) -> UserError:
    return UserError(f"{path}: missing, damaged or edited: it does not match its hash; make it again with {remake}")
