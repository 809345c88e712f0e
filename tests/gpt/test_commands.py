"""The command gpt-frontend: what it lists, what it starts, what it says of a mistake."""

import os
import pkgutil
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from gpt import commands
from gpt.cli import UserError
from gpt.commands import COMMANDS, OPTIONS, find_module, help_text, source_of, summary_of, version_text
from gpt.version import project_version, source_commit

ROOT = Path(__file__).parents[2]
# Itself, ends of a pipe, and what make matrix runs in an environment of its own.
NOT_TYPED = {"gpt.commands", "bench.harness.worker", "bench.studies.foreign_files", "tvm_frontend.relay.worker"}


def call(*arguments: str, module: str = "gpt.commands", cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")


def test_every_module_that_can_be_run_is_a_command() -> None:
    found = {
        module_of(path)
        for package in ("gpt", "export", "tvm_frontend", "bench")
        for path in (ROOT / package).rglob("*.py")
        if re.search(r'^if __name__ == "__main__":', path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert set(COMMANDS.values()) == found - NOT_TYPED
    assert len(set(COMMANDS.values())) == len(COMMANDS)


def test_the_console_script_is_this_command() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {name: pkgutil.resolve_name(target) for name, target in project["scripts"].items()} == {
        "gpt-frontend": commands.main
    }


@pytest.mark.parametrize("module", COMMANDS.values())
def test_a_command_has_one_line_of_its_modules_docstring(module: str) -> None:
    summary = summary_of(module)
    assert source_of(module).is_file()
    assert 10 < len(summary) < 130
    assert not {"\n", "{", "`"} & set(summary)
    assert summary.split()[0] in source_of(module).read_text(encoding="utf-8")


def test_a_docstring_of_examples_alone_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one.py").write_text('"""python -m one\npython -m one --twice\n"""\n')
    (tmp_path / "two.py").write_text('"""python -m two\n\nDo a thing\nwell: at once, as in a.b. Then more.\n"""\n')
    monkeypatch.setattr(commands, "PACKAGES_FOLDER", tmp_path)
    with pytest.raises(ValueError, match="one: its docstring is examples only"):
        summary_of("one")
    assert summary_of("two") == "Do a thing well"


def test_the_list_and_the_version_need_neither_torch_nor_tvm() -> None:
    code = (
        "import sys; from gpt.commands import run\n"
        "for option in ('--help', '--version'): run([option])\n"
        "sys.exit(str({'numpy', 'onnx', 'torch', 'tvm', 'tyro'} & set(sys.modules) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.strip() == ""
    assert done.stdout == help_text() + version_text() + "\n"


def test_the_list_has_every_command_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    commands.run([])
    listed = re.findall(r"^  ([a-z][\w-]+)  +\S.*$", capsys.readouterr().out, re.MULTILINE)
    assert listed == list(COMMANDS)


@pytest.mark.parametrize(("command", "module"), COMMANDS.items())
def test_a_command_runs_its_module_with_the_arguments_behind_it(
    command: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    monkeypatch.setattr(sys, "argv", ["gpt-frontend", command, "--help", "--version", "x"])
    monkeypatch.setattr(runpy, "run_module", lambda name, **how: ran.append((name, how, sys.argv[1:])))
    commands.run(sys.argv[1:])
    assert ran == [(module, {"run_name": "__main__", "alter_sys": True}, ["--help", "--version", "x"])]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("missing.txt", "-o", "corpus"), ("--nonesuch",)])
def test_exit_code_and_error_are_those_of_the_module(arguments: tuple[str, ...], tmp_path: Path) -> None:
    ours, theirs = call("corpus", *arguments, cwd=tmp_path), call(*arguments, module="gpt.corpus", cwd=tmp_path)
    assert ours.returncode == theirs.returncode == 2
    assert (ours.stdout, ours.stderr) == (theirs.stdout, theirs.stderr)


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("trian", "did you mean train?"),
        ("inspect", "did you mean inspect-checkpoint, inspect-onnx, inspect-kernels?"),
        ("--verison", "gpt-frontend --help lists them"),
        ("", "gpt-frontend --help lists them"),
    ],
)
def test_an_unknown_command_names_those_that_are_like_it(word: str, hint: str) -> None:
    with pytest.raises(UserError, match=f"^{word!r}: no such command; {re.escape(hint)}$"):
        find_module(word)


def test_an_unknown_command_is_one_line_and_exit_2() -> None:
    done = call("trian")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: 'trian': no such command; did you mean train?\n"


@pytest.mark.parametrize("shell", ["", "fish", "bash zsh"])
def test_completion_is_for_two_shells(shell: str) -> None:
    with pytest.raises(UserError, match=f"--print-completion {shell}: must be bash or zsh"):
        commands.run(["--print-completion", *shell.split()])


def completed(*words: str) -> list[str]:
    script = commands.completion("bash") + '_gpt_frontend; printf "%s\\n" "${COMPREPLY[@]}"'
    state = f"COMP_WORDS=({' '.join(map(repr, words))}) COMP_CWORD={len(words) - 1}\n"
    return subprocess.run(["bash", "-c", state + script], capture_output=True, text=True, check=True).stdout.split()


def test_bash_completes_commands_and_leaves_the_rest_to_files() -> None:
    assert completed("gpt-frontend", "") == [*COMMANDS, *OPTIONS]
    assert completed("gpt-frontend", "inspect-") == ["inspect-checkpoint", "inspect-onnx", "inspect-kernels"]
    assert completed("gpt-frontend", "train", "b") == []


def test_zsh_has_each_command_with_its_line() -> None:
    script = commands.completion("zsh")
    assert re.findall(r"^ +'([\w-]+):", script, re.MULTILINE) == list(COMMANDS)
    if zsh := shutil.which("zsh"):
        subprocess.run([zsh, "-n"], input=script, text=True, check=True)


def test_the_version_names_the_commit_of_a_checkout() -> None:
    assert version_text() == f"gpt-frontend {project_version()}"
    commit = source_commit(ROOT)
    assert commit is None or version_text().endswith(f"+g{commit[:12]}")
