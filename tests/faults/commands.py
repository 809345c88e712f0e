"""Runs commands in forks of one process, which has imported what they need; conftest.py starts it and talks to it.

Each line of its input is a request in JSON; when the fork has ended, a line of output says its exit code, the kinds of
the file operations that it made below a folder, and what it printed. One of the operations may be disturbed: see
faults.c, which is preloaded.
"""

import ctypes
import importlib
import json
import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from gpt.cli import run_command

IMPORTED = ("gpt.train", "gpt.corpus", "export.onnx", "export.huggingface", "export.quantize", "bench.report.page")
IMPORTED += ("torch._dynamo", "onnxruntime.quantization")  # what these import at their first call
OPTIONAL = ("ctranslate2.converters", "transformers.models.gpt2.modeling_gpt2", "export.ctranslate2")


def write_report() -> None:
    """Write a report of three files, which say what the command line says."""
    from bench.report import page

    words, folder = sys.argv[1:]
    page._render = lambda template, results: f"{template}: {results}"
    page.write_report({"words": words}, Path(folder))


def run(request: dict[str, Any], faults: ctypes.CDLL, told: Path) -> NoReturn:
    """Be the command that the request asks for, to the end of this process."""
    code: Any = 1
    try:
        for number, path in enumerate((os.devnull, told / "out", told / "err")):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
        for module, name, value in request["patches"]:
            setattr(importlib.import_module(module), name, value if value is not None else lambda *_, **__: "")
        sys.argv = [request["module"], *request["arguments"]]
        own = request["module"] == "write_report"
        main = write_report if own else importlib.import_module(request["module"]).main
        os.environ |= request["variables"]
        faults.faults_arm(request["folder"].encode(), request["number"], request["error"])
        try:
            run_command(main)
            code = 0
        except SystemExit as end:
            code = end.code
        sys.stdout.flush()
        counted = faults.faults_disarm()
        (told / "kinds").write_bytes(faults.faults_kinds()[:counted])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Answer until the input ends."""
    faults, told = ctypes.CDLL(sys.argv[1]), Path(sys.argv[2])
    faults.faults_kinds.restype = ctypes.c_char_p
    for module in IMPORTED:
        importlib.import_module(module)
    with suppress(ImportError):
        for module in OPTIONAL:
            importlib.import_module(module)
    for line in sys.stdin:
        for name in ("out", "err", "kinds"):
            (told / name).write_bytes(b"")
        child = os.fork()
        if child == 0:
            run(json.loads(line), faults, told)
        answer: dict[str, Any] = {"code": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}
        answer |= {name: (told / name).read_text(errors="replace") for name in ("out", "err", "kinds")}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
