"""python -m bench.gpu.table docs/gpu

Write README.md from the JSON files of python -m bench.gpu that lie in a folder, whichever runs they are of.
"""

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is one line too
    from gpt.cli import run_main

    run_main("bench.gpu.table")

import json
from pathlib import Path
from typing import Annotated, Any

import tyro
from tabulate import tabulate

from bench.gpu.engines import OURS
from bench.harness.plan import ROUNDS
from bench.report.format import milliseconds, percent, times
from gpt.cli import UserError
from gpt.files import atomic_output

TABLE, KERNELS, SANITIZER = "README.md", "kernels.json", "sanitizer.json"
HEAD = """# {title}

Written by `python -m bench.gpu`; the numbers are in the JSON files beside it, every sample among them.

- Each engine runs alone in a process of its own, stopped while others run; {rounds} turns each, in rotating order.
- Times are of CUDA events on the stream that the work is on, prompts, results and the KV cache on the device all the
  time, calls queued one behind the other, warm. The median of all samples; the spread is the slowest turn's over the
  fastest, less 1.
- The floor is the larger of two times: the floating-point operations over the rate of a large product, and the bytes
  that must be read over the bandwidth of a large copy (read and written), both measured in the same run; which one
  binds is beside it.
- Every engine is compared with eager in float64 on the same device before it is timed; the error is the largest, over
  the largest logit. A row that could not be timed says why.
"""
COLUMNS = ("engine", "precision", "ms", "spread", "floor ms", "of the floor", "binds", "× eager", "error")
ALIGNMENT = ("left", "left", *["right"] * (len(COLUMNS) - 2))  # words to the left, numbers to the right
TITLES = {
    "first-token": "First token: a prompt into the cache, B × T",
    "decode": "Decode: one token of each sequence over the cache",
    "generate": "Generate: tokens after a prompt, each chosen on the device; times of one",
}


def write_table(folder: Path) -> Path:
    """Write the table of all results in a folder, and return its path. Raises UserError if there are none."""
    found = {file.name: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))}
    kernels, findings = found.pop(KERNELS, None), found.pop(SANITIZER, [])
    races = list(found.values())
    if not (races or kernels or findings):
        raise UserError(f"{folder}: no JSON files of python -m bench.gpu there; run that first")
    tried = any("arch" not in race["device"] for race in races)
    title = "The measurement of a GPU, tried on a CPU" if tried else "Measured on a GPU"
    blocks = [HEAD.format(title=title, rounds=ROUNDS), *_limit_lines(races)]
    blocks += _kernel_lines(kernels) if kernels else []
    blocks += _sanitizer_lines(findings) if findings else []
    for race in sorted(races, key=lambda race: race["parameters"]):
        blocks += race_lines(race)
    with atomic_output(folder / TABLE) as part:
        part.write_text("\n".join(blocks) + "\n", encoding="utf-8")
    return folder / TABLE


def race_lines(race: dict[str, Any]) -> list[str]:
    """Write one race in Markdown: a table for each work, the fastest first, and the rows that could not be timed."""
    size = f"{race['parameters'] / 1e6:.0f} million parameters"
    lines = ["", f"## {race['model']}, {size}", ""]
    lines.append(f"On {race['device']['name']}, {race['created']}: `{race['command']}`, seed {race['seed']}.")
    before = None
    works = dict.fromkeys((row["phase"], row["work"]) for row in race["rows"])
    for phase, work in sorted(works, key=lambda each: [*TITLES].index(each[0])):
        lines += ["", f"### {TITLES[phase]}"] * (phase != before)
        before = phase
        rows = [row for row in race["rows"] if (row["phase"], row["work"]) == (phase, work)]
        timed = sorted((row for row in rows if row["median_ms"] is not None), key=lambda row: row["median_ms"])
        lines += ["", f"**{work}**{_against_peers(timed)}", ""]
        if timed:
            cells = [cells_of(row) for row in timed]
            lines += [tabulate(cells, COLUMNS, "pipe", colalign=ALIGNMENT, disable_numparse=True), ""]
        lines += [f"- {row['label']}: {row['status']}: {row['reason']}" for row in rows if row["median_ms"] is None]
    lines += ["", "What ran:", ""] * bool(race["notes"])
    lines += [f"- {label}: {name}: {value}" for label, notes in race["notes"].items() for name, value in notes.items()]
    lines += ["", "Versions: " + ", ".join(f"{name} {version}" for name, version in race["versions"].items()) + "."]
    return lines


def cells_of(row: dict[str, Any]) -> tuple[str, ...]:
    """Format a timed row as the cells under COLUMNS."""
    return (
        row["label"],
        row["precision"],
        milliseconds(row["median_ms"]),
        "–" if row["spread"] is None else percent(100 * row["spread"]),
        milliseconds(row["limit_ms"]),
        percent(row["percent_of_limit"]),
        row["limit_binds"],
        times(row["speedup"]["median"]) if row["speedup"] else "–",
        f"{row['max_rel_err']:.1e}",
    )


def _against_peers(timed: list[dict[str, Any]]) -> str:
    """Compare our engine with the fastest of the others, if both were timed; else return nothing."""
    ours = next((row for row in timed if row["label"] == OURS), None)
    peer = next((row for row in timed if row["engine"] != OURS.split()[0]), None)
    if ours is None or peer is None:
        return ""
    return f": {OURS} runs at {times(peer['median_ms'] / ours['median_ms'])} times the speed of {peer['label']}"


def _limit_lines(races: list[dict[str, Any]]) -> list[str]:
    lines: list[str] = []
    for name in dict.fromkeys(race["device"]["name"] for race in races):
        here = [race for race in races if race["device"]["name"] == name]
        device = here[0]["device"]
        about = [f"{device['arch']}, {device['multiprocessors']} multiprocessors"] if "arch" in device else []
        about += [f"{device['memory_bytes'] / 2**30:.0f} GiB", f"host {device['host']}"]
        limits = [each for race in here for each in race["limits"].values()]
        copy = max(each["memory_bytes_per_s"] for each in limits)
        lines.append(
            f"{name} ({', '.join(about)}). The best of all its runs: a copy at {copy / 1e9:,.0f} GB/s; products:"
        )
        for precision in dict.fromkeys(each["precision"] for each in limits):
            peak = max(each["peak_flops_per_s"] for each in limits if each["precision"] == precision)
            lines.append(f"- {precision}: {peak / 1e12:.4g} TFLOP/s")
        lines.append("")
    return lines


def _kernel_lines(kernels: dict[str, Any]) -> list[str]:
    cases = kernels["cases"]
    agree = [case for case in cases if case["status"] == "agrees"]
    lines = ["## Kernels against float64", "", f"{len(agree)} of {len(cases)} cases agree, {kernels['where']}."]
    lines += [f"Not all were run: {kernels['reason']}"] * bool(kernels["reason"])
    lines += [f"- {case['name']}: {case['status']}: {case['reason']}" for case in cases if case["status"] != "agrees"]
    worst: dict[str, float] = {}
    for case in agree:
        test = case["name"].split("[")[0]
        worst[test] = max(worst.get(test, 0.0), case["error_of_tolerance"] or 0.0)
    lines += ["", "The largest error of each test, as a share of what rounding explains:", ""] * bool(worst)
    return [*lines, *(f"- {test}: {percent(100 * share)}" for test, share in worst.items())]


def _sanitizer_lines(findings: list[dict[str, Any]]) -> list[str]:
    lines = [f"- {each['tool']}: {each['status']}: {each['said']} ({each['seconds']:.0f} s)" for each in findings]
    return ["", "## Kernels under compute-sanitizer", "", *lines]


def table_command(
    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")] = Path("docs/gpu"),
) -> None:
    """Write README.md from the JSON files of python -m bench.gpu.

    Args:
        folder: where they lie
    """
    print(f"wrote {write_table(folder)}")


def main() -> None:
    """Parse the command line and write."""
    tyro.cli(table_command, prog="python -m bench.gpu.table")
