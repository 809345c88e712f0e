"""Writes results to three files with the same content: results.json for programs, report.md and report.html for people.

A row of results.json has these fields:
- group (the precision that is compared), engine, variant, label, precision (differs from group in a row that is shown
  for comparison), dtype, threads
- phase (`prefill`, `decode`, `generate`), work (its name within the phase), B, T and context (T tokens of each of B
  sequences, after `context` tokens), unit (a time is per `prefill` or per `token`)
- status (`timed`, `absent`, `failed`, `disagrees`, `left out`) and, unless timed, the reason
- samples_ms, samples_by_round (the number of samples of each round), median_ms, spread (slowest round over fastest,
  less 1), speedup (over the baseline in the same round: median, low, high)
- limit_ms, limit_binds, percent_of_limit (the roofline bound), moved_bytes (bytes that a unit must move)
- max_abs_err, max_rel_err, top1_match, share_of_allowed, agrees, tolerance: see `bench.correctness.agreement.Agreement`
"""

import json
from collections.abc import Callable
from pathlib import Path
from textwrap import indent

from tabulate import tabulate

from bench.correctness.agreement import PRECISIONS
from bench.harness.work import PHASES
from bench.report import cliffs, plots
from bench.report.format import duration, factor, milliseconds, percent, size, times
from bench.report.summary import (
    absent_engines,
    glance,
    headline_of,
    in_group,
    limited,
    name_of,
    noise_floor,
    paired_variants,
    phases_in,
    reliability,
    rows_at,
    statements,
    timed,
    works_in,
    worst_error,
)
from gpt.files import atomic_outputs

TEMPLATES = Path(__file__).parent / "templates"
RESULTS = "results.json"  # the first of the three, which stands for all when they are held
MANY = 4  # a phase with more works than this gets an overview, and its tables and plots are folded


def write_report(results: dict, folder: Path) -> Path:
    """Write results.json, report.md and report.html into a folder, all or none, and return report.html's path.

    Raises UserError if the folder cannot be written.
    """
    contents = {
        RESULTS: json.dumps(results, indent=1, allow_nan=False) + "\n",
        "report.md": _render("report.md.jinja", results),
        "report.html": _render("report.html.jinja", results),
    }
    with atomic_outputs([folder / name for name in contents]) as parts:
        for part, content in zip(parts, contents.values(), strict=True):
            part.write_text(content, encoding="utf-8")
    return folder / "report.html"


def table_text(results: dict) -> str:
    """Format the comparison of one precision for a terminal, one block per work."""
    blocks = []
    for phase in phases_in(results):
        for work in works_in(results, phase):
            rows = rows_at(results, phase, work)
            heads, cells = columns_of(results, phase), [cells_of(row) for row in rows if row["status"] == "timed"]
            alignment = ["left", *["right"] * (len(heads) - 1)]
            table = tabulate(cells, heads, "plain", colalign=alignment, disable_numparse=True)
            block = [f"{phase} {work} · {rows[0]['threads']} threads · {limit_of(limited(rows))}"]
            block.append(indent(table, "  "))
            block += [f"  {row['label']}: {row['status']}: {row['reason']}" for row in rows if row["status"] != "timed"]
            blocks.append("\n".join(block))
    last = (_loss_lines(results), _cliff_lines(results), _absent_lines(results))
    blocks += ["\n".join(lines) for lines in last if lines]
    return "\n\n".join(blocks)


def _loss_lines(results: dict) -> list[str]:
    if not results["losses"]:
        return []
    widest = max(len(each["label"]) for each in results["losses"])
    lines = [f"  {each['label']:{widest}}  {loss_text(each)}" for each in results["losses"]]
    return [f"loss on {results['text']}; float64: {results['losses'][0]['reference']:.4f} nats a token", *lines]


def _cliff_lines(results: dict) -> list[str]:
    found = cliffs.cliffs(results["rows"])
    lines = [
        f"  {label}: " + ", ".join(f"T={T} {times(ratio)}" for T, ratio in ratios.items())
        for label, ratios in found.items()
    ]
    head = f"odd lengths: time over that interpolated from the neighbours; the bar is {cliffs.BAR}"
    return [head, *lines] * bool(found)


def _absent_lines(results: dict) -> list[str]:
    return [f"{name} is absent: {reason}" for name, reason in absent_engines(results).items()]


def loss_text(each: dict) -> str:
    """Format an engine's loss and its excess over the reference's, or the reason why there is none."""
    return each["reason"] if each["loss"] is None else f"{each['loss']:.4f} ({each['percent_above']:+.3f} %)"


def columns_of(results: dict, phase: str) -> list[str]:
    """List the column heads of a phase's table."""
    return ["engine", *(name.replace("eager", results["baseline"]) for name in PHASES[phase].columns)]


def cells_of(row: dict) -> list[str]:
    """Format a timed row as the cells of its phase's table."""
    return [name_of(row), *(CELLS[name](row) for name in PHASES[row["phase"]].columns)]


def limit_of(row: dict) -> str:
    """Describe a row's roofline bound, which is the same for all engines of its precision at this work."""
    moved = (
        f"{size(row['moved_bytes'])} must be read a token, " if row["unit"] == "token" and row["moved_bytes"] else ""
    )
    return f"{moved}limit {duration(row['limit_ms'])}, by {row['limit_binds']}"


def _speedup(row: dict) -> str:
    speedup = row["speedup"]
    return f"{times(speedup['median'])} ({times(speedup['low'])}–{times(speedup['high'])})" if speedup else "–"


# Formatters of the cells of a timed row, by the column's name in `bench.harness.work`.
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


COMPILED_COLUMNS = ["compiled by", "import", "build", "library", "weights", "kernels", "calls", "median", "error"]


def _render(template: str, results: dict) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=template.startswith("report.html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": duration, "factor": factor, "percent": percent}
    return environment.get_template(template).render(_view(results, with_plots=template.startswith("report.html")))


def _view(results: dict, with_plots: bool) -> dict:
    """Collect the variables of the templates."""
    groups = [_group(in_group(results, precision), with_plots) for precision in results["precisions"]]
    named = {(row["phase"], row["work"]) for row in results["rows"]}
    return {
        "results": results,
        "groups": groups,
        "precisions": PRECISIONS,
        "alone": groups[0] if len(groups) == 1 else None,
        "cells_of": cells_of,
        "compiled_columns": COMPILED_COLUMNS,
        "limit_of": limit_of,
        "limited": limited,
        "name_of": name_of,
        "loss_text": loss_text,
        "bar": cliffs.BAR,
        "worst": worst_error(results),
        "engines": list(dict.fromkeys((row["label"], row["summary"]) for row in results["rows"])),
        "noise": noise_floor(results),
        "only_checked": [
            f"{phase} {work}"
            for phase, work in dict.fromkeys((each["phase"], each["work"]) for each in results["checks"])
            if (phase, work) not in named
        ],
    }


def _group(results: dict, with_plots: bool) -> dict:
    """Collect the variables of one precision. results: those of this precision alone."""
    rows = [row for row in timed(results) if row["precision"] == results["precision"]]
    found = cliffs.cliffs(results["rows"])
    return {
        "precision": results["precision"],
        "baseline": results["baseline"],
        "statements": statements(results),
        "absent": absent_engines(results),
        "glance": glance(results),
        "reliability": reliability(results),
        "sections": [_section(results, phase, with_plots) for phase in phases_in(results)],
        "losses": sorted(results["losses"], key=lambda each: each["loss"] or float("inf")),
        "cliffs": found,
        "cliff_lengths": [T for T in cliffs.CLIFF_LENGTHS if any(T in ratios for ratios in found.values())],
        "errors_plot": plots.errors(rows) if with_plots and rows else None,
    }


def _section(results: dict, phase: str, with_plots: bool) -> dict:
    """Collect the variables of one phase."""
    pairs = [pair for pair in paired_variants(results) if pair["phase"] == phase]
    tables = {work: rows_at(results, phase, work) for work in works_in(results, phase)}
    headline = headline_of(results, phase)
    rows = [row for row in timed(results) if row["phase"] == phase]
    return {
        "phase": phase,
        "title": PHASES[phase].title,
        "about": PHASES[phase].about,
        "columns": columns_of(results, phase),
        "tables": tables,
        "headline": headline,
        "first": tables[headline][0],
        "compiled": _compiled(results, phase, headline),
        "pairs": pairs,
        "overview": _overview(tables) if len(tables) > MANY else None,
        "plots": {work: plots.latency(rows, results["baseline"]) for work, rows in tables.items()}
        if with_plots
        else {},
        "pairs_plots": _pairs_plots(pairs) if with_plots else {},
        "shares_plot": plots.shares(rows) if with_plots and len(tables) > MANY and rows else None,
    }


def _pairs_plots(pairs: list[dict]) -> dict[str, str]:
    """Draw a plot for each engine with a before and an after variant, by its title."""
    by_title: dict[str, list[dict]] = {}
    for pair in pairs:
        by_title.setdefault(f"{pair['before']['label']} → {pair['after']['label']}", []).append(pair)
    return {title: plots.before_after(of_engine) for title, of_engine in by_title.items()}


def _compiled(results: dict, phase: str, work: str) -> list[list[str]]:
    """Format the build statistics, one row of COMPILED_COLUMNS per engine."""
    rows = {row["label"]: row for row in rows_at(results, phase, work) if row["status"] == "timed"}
    return [
        [
            each["label"],
            f"{each['import_s']:.1f} s",
            f"{each['build_s']:.1f} s",
            size(each["library_bytes"]),
            size(each["weights_bytes"]),
            str(each["kernels"]),
            str(each["calls"]),
            *(CELLS[name](rows[each["label"]]) if each["label"] in rows else "–" for name in ("median", "error")),
        ]
        for each in results["compiled"]
        if (each["phase"], each["work"]) == (phase, work)
    ]


def _overview(tables: dict[str, list[dict]]) -> dict:
    """Summarise many works: one row per engine, one column per work, and the lead of the fastest engine.

    A cell has the median, or the status if there is none, the share of the bound, and a flag for the fastest.
    """
    fastest = {work: rows[0] for work, rows in tables.items() if rows[0]["status"] == "timed"}
    lines: dict[str, dict[str, dict]] = {}
    for work, rows in tables.items():
        for row in rows:
            cell = {"time": row["status"], "share": "–", "first": False}
            if row["status"] == "timed":
                cell = {
                    "time": duration(row["median_ms"]),
                    "share": percent(row["percent_of_limit"]),
                    "first": row is fastest[work],
                }
            lines.setdefault(name_of(row), {})[work] = cell
    leads = {}
    for work, first in fastest.items():
        others = [row for row in tables[work] if row["status"] == "timed" and row["engine"] != first["engine"]]
        if others:
            leads[work] = f"{others[0]['median_ms'] / first['median_ms']:.2f}×"
    return {
        "works": list(tables),
        "lines": {label: [cells[work] for work in tables] for label, cells in lines.items()},
        "leads": [leads.get(work, "–") for work in tables],
    }
