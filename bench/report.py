"""Results to three files that say the same: results.json for programs, report.md, and report.html for people.

A row of results.json: engine, variant, label; phase (`prefill`, `decode`, `generate`), work (its name in the phase), B,
T and context (T tokens of B sequences, behind `context` tokens), unit (what a time is of: a `prefill` or a `token`);
dtype, threads; status (`timed`, `absent`, `failed`, `disagrees`) and the reason for the last three; samples_ms,
samples_by_round (how many of them are of each round), median_ms, spread (slowest round over fastest, less 1), speedup
(over the baseline in the same round: median, low, high); limit_ms, limit_binds, percent_of_limit, moved_bytes (that a
unit must move); max_abs_err, max_rel_err, top1_match, agrees, tolerance.
"""

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from bench import plots
from bench.agreement import PRECISIONS
from bench.phases import PHASES
from bench.units import duration, milliseconds, percent, size, times
from bench.verdict import (
    headline_of,
    noise_floor,
    paired_variants,
    phases_in,
    rows_at,
    statements,
    timed,
    works_in,
    worst_error,
)
from gpt.files import atomic_output

TEMPLATES = Path(__file__).parent / "templates"


def write_report(results: dict, folder: Path) -> Path:
    """Write results.json, report.md and report.html into a folder, all of them or none, and return the last's path.

    Raises UserError if the place cannot be written.
    """
    contents = {
        "results.json": json.dumps(results, indent=1, allow_nan=False) + "\n",
        "report.md": _render("report.md.jinja", results),
        "report.html": _render("report.html.jinja", results),
    }
    with ExitStack() as stack:
        parts = {name: stack.enter_context(atomic_output(folder / name)) for name in contents}
        for name, content in contents.items():
            parts[name].write_text(content, encoding="utf-8")
    return folder / "report.html"


def table_text(results: dict) -> str:
    """The comparison as lines for a terminal, one block a piece of work."""
    blocks = []
    for phase in phases_in(results):
        for work in works_in(results, phase):
            rows = rows_at(results, phase, work)
            lines = [columns_of(results, phase), *(cells_of(row) for row in rows if row["status"] == "timed")]
            widths = [max(len(text) for text in column) for column in zip(*lines, strict=True)]
            block = [f"{phase} {work} · {rows[0]['threads']} threads · {limit_of(rows[0])}"]
            block += ["  " + "  ".join(_aligned(line, widths)) for line in lines]
            block += [f"  {row['label']}: {row['status']}: {row['reason']}" for row in rows if row["status"] != "timed"]
            blocks.append("\n".join(block))
    return "\n\n".join(blocks)


def columns_of(results: dict, phase: str) -> list[str]:
    """The heads of a phase's table."""
    return ["engine", *(name.replace("eager", results["baseline"]) for name in PHASES[phase].columns)]


def cells_of(row: dict) -> list[str]:
    """A timed row as the text of its phase's columns."""
    return [row["label"], *(CELLS[name](row) for name in PHASES[row["phase"]].columns)]


def limit_of(row: dict) -> str:
    """A row's limit in words, the same for all engines at this work."""
    moved = (
        f"{size(row['moved_bytes'])} must be read a token, " if row["unit"] == "token" and row["moved_bytes"] else ""
    )
    return f"{moved}limit {duration(row['limit_ms'])}, by {row['limit_binds']}"


def _speedup(row: dict) -> str:
    speedup = row["speedup"]
    return f"{times(speedup['median'])} ({times(speedup['low'])}–{times(speedup['high'])})" if speedup else "–"


# What a table can show of a timed row, by the column's name in `bench.phases`.
CELLS: dict[str, Callable[[dict], str]] = {
    "median": lambda row: duration(row["median_ms"]),
    "ms/token": lambda row: milliseconds(row["median_ms"]),
    "tok/s": lambda row: f"{row['B'] * 1e3 / row['median_ms']:,.0f}",
    "spread": lambda row: "–" if row["spread"] is None else f"{100 * row['spread']:.1f} %",
    "× eager": _speedup,
    "GB/s": lambda row: f"{row['moved_bytes'] / row['median_ms'] / 1e6:.1f}",
    "of limit": lambda row: percent(row["percent_of_limit"]),
    "error": lambda row: f"{row['max_rel_err']:.1e}",
    "top-1": lambda row: f"{100 * row['top1_match']:.4g} %",
    "same tokens": lambda row: f"{100 * row['top1_match']:.4g} %",
}


def _aligned(line: list[str], widths: list[int]) -> list[str]:
    first, *rest = (
        text.ljust(width) if index == 0 else text.rjust(width)
        for index, (text, width) in enumerate(zip(line, widths, strict=True))
    )
    return [first, *rest]


def _render(template: str, results: dict) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=template.startswith("report.html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": duration, "percent": percent}
    return environment.get_template(template).render(_view(results, with_plots=template.startswith("report.html")))


def _view(results: dict, with_plots: bool) -> dict:
    """What the templates show."""
    named = {(row["phase"], row["work"]) for row in results["rows"]}
    return {
        "results": results,
        "statements": statements(results),
        "sections": [_section(results, phase, with_plots) for phase in phases_in(results)],
        "cells_of": cells_of,
        "limit_of": limit_of,
        "worst": worst_error(results),
        "engines": list(dict.fromkeys((row["label"], row["summary"]) for row in results["rows"])),
        "tolerance_reasons": {row["dtype"]: PRECISIONS[row["dtype"]].reason for row in results["rows"]},
        "noise": noise_floor(results),
        "odd": [
            f"{phase} {work}"
            for phase, work in dict.fromkeys((each["phase"], each["work"]) for each in results["checks"])
            if (phase, work) not in named
        ],
        "errors_plot": plots.errors(timed(results)) if with_plots and timed(results) else None,
    }


def _section(results: dict, phase: str, with_plots: bool) -> dict:
    """What the templates show of one phase."""
    pairs = [pair for pair in paired_variants(results) if pair["phase"] == phase]
    tables = {work: rows_at(results, phase, work) for work in works_in(results, phase)}
    headline = headline_of(results, phase)
    return {
        "phase": phase,
        "title": PHASES[phase].title,
        "about": PHASES[phase].about,
        "columns": columns_of(results, phase),
        "tables": tables,
        "headline": headline,
        "first": tables[headline][0],
        "pairs": pairs,
        "plots": {work: plots.latency(rows, results["baseline"]) for work, rows in tables.items()}
        if with_plots
        else {},
        "pairs_plot": plots.before_after(pairs) if with_plots and pairs else None,
    }
