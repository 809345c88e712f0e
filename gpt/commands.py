"""gpt-frontend COMMAND: every command of the project under one name, each the same as `python -m` of its module.

gpt-frontend train char-cpu --corpus input.txt         # python -m gpt.train char-cpu --corpus input.txt
gpt-frontend --help                                    # the commands
gpt-frontend --version                                 # the version, and a checkout's commit
eval "$(gpt-frontend --print-completion bash)"         # completes commands and file names; also zsh

A module is named here and imported only when its command runs, so that the list needs neither PyTorch nor TVM. Standard
library only.
"""

import ast
import difflib
import re
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from gpt.cli import UserError, run_command
from gpt.version import PROJECT, project_version

COMMANDS = {
    "train": "gpt.train",
    "corpus": "gpt.corpus",
    "pretrained": "gpt.pretrained",
    "generate": "gpt.generate",
    "inspect-checkpoint": "gpt.inspect",
    "export": "export.onnx",
    "inspect-onnx": "export.inspect",
    "huggingface": "export.huggingface",
    "ctranslate2": "export.ctranslate2",
    "quantize": "export.quantize",
    "compile": "tvm_frontend.compile",
    "tune": "tvm_frontend.tune",
    "inspect-kernels": "tvm_frontend.inspect",
    "bench": "bench",
    "bench-generate": "bench.generate",
    "bench-ladder": "bench.ladder",
    "bench-search": "bench.search",
    "bench-support": "bench.support",
    "bench-training": "bench.training",
    "bench-gpu": "bench.gpu",
    "bench-gpu-cases": "bench.gpu.cases",
    "bench-gpu-table": "bench.gpu.table",
    "bench-gpu-sanitize": "bench.gpu.sanitize",
}
OPTIONS = ("--help", "--version", "--print-completion")
PACKAGES_FOLDER = Path(__file__).resolve().parents[1]  # of a checkout, or site-packages

BASH = """\
_gpt_frontend() {{
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{words}" -- "${{COMP_WORDS[1]}}"))
    fi
}}
complete -o default -F _gpt_frontend {name}
"""
ZSH = """\
#compdef {name}
_gpt_frontend() {{
    local -a commands
    commands=(
{described}
    )
    if (( CURRENT == 2 )); then
        _describe command commands
    else
        _files
    fi
}}
if [ "$funcstack[1]" = _gpt_frontend ]; then
    _gpt_frontend "$@"
else
    compdef _gpt_frontend {name}
fi
"""


def source_of(module: str) -> Path:
    """Return the file that `python -m module` runs, without importing any of the packages it is in."""
    path = PACKAGES_FOLDER.joinpath(*module.split("."))
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


def summary_of(module: str) -> str:
    """Return what a command does in one line: its docstring's first clause that is no example of a command line."""
    docstring = ast.get_docstring(ast.parse(source_of(module).read_text(encoding="utf-8"))) or ""
    for paragraph in docstring.split("\n\n"):
        if not paragraph.startswith(("python ", "torchrun ")):
            return re.split(r"[.:;](?=\s|$)", " ".join(paragraph.split()), maxsplit=1)[0]
    raise ValueError(f"{module}: its docstring is examples only, and does not say what it does")


def help_text() -> str:
    """Return the list of the commands with a line each."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {summary_of(module)}" for name, module in COMMANDS.items())
    return f"""\
usage: {PROJECT} COMMAND [ARGUMENTS]
       {PROJECT} --version
       {PROJECT} --print-completion bash|zsh

{PROJECT} COMMAND --help shows what a command takes.

{commands}
"""


def version_text() -> str:
    """Return the name and version, which has the commit in a checkout."""
    return f"{PROJECT} {project_version()}"


def completion(shell: str) -> str:
    """Return a script that completes the commands in a shell. Raises UserError for another than bash and zsh."""
    if shell == "bash":
        return BASH.format(name=PROJECT, words=" ".join([*COMMANDS, *OPTIONS]))
    if shell == "zsh":
        lines = (f"{name}:{summary_of(module)}".replace("'", "'\\''") for name, module in COMMANDS.items())
        return ZSH.format(name=PROJECT, described="\n".join(f"        '{line}'" for line in lines))
    raise UserError(f"--print-completion {shell}: must be bash or zsh")


def find_module(command: str) -> str:
    """Return the module of a command. Raises UserError for another word, with the commands that are like it."""
    if command in COMMANDS:
        return COMMANDS[command]
    near = [name for name in COMMANDS if command in name.split("-")] or difflib.get_close_matches(command, COMMANDS)
    hint = f"did you mean {', '.join(near)}?" if near else f"{PROJECT} --help lists them"
    raise UserError(f"{command!r}: no such command; {hint}")


def run(arguments: Sequence[str]) -> None:
    """Do what the command line asks for; a command replaces `sys.argv` and runs as this process's main module."""
    command, *rest = arguments or ["--help"]
    if command in ("--help", "-h"):
        print(help_text(), end="")
    elif command == "--version":
        print(version_text())
    elif command == "--print-completion":
        print(completion(" ".join(rest)), end="")
    else:
        module = find_module(command)
        sys.argv[1:] = rest
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def main() -> None:
    """Run as `gpt-frontend`, whose exit code and error lines are those of the command's module."""
    run_command(lambda: run(sys.argv[1:]))


if __name__ == "__main__":
    main()
