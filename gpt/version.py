"""Say which version of the project this is, and of which commit. Standard library only."""

import importlib.metadata
import shutil
import subprocess
import tomllib
from pathlib import Path

NAME = "gpt-frontend"
ROOT = Path(__file__).resolve().parents[1]


def project_version(root: Path = ROOT) -> str:
    """Return the version that pyproject.toml of a checkout states, else that of the installed package."""
    settings = root / "pyproject.toml"
    if settings.is_file():
        project = tomllib.loads(settings.read_text(encoding="utf-8")).get("project", {})
        if project.get("name") == NAME:
            return str(project["version"])
    return importlib.metadata.version(NAME)


def project_commit(root: Path = ROOT) -> str | None:
    """Return a checkout's commit as git abbreviates it, with `-dirty` if files were changed since.

    None where there is no checkout (an installed wheel, a source archive), or no git that reads it.
    """
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return None
    command = [git, "-C", root, "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or None
