"""Results to three files that say the same: results.json for programs, report.md, and report.html for people.

A row of results.json: engine, variant, label, phase, dtype, B, T, threads; status (`timed`, `absent`, `failed`,
`disagrees`) and the reason for the last three; samples_ms, samples_by_round (how many of them are of each round),
median_ms, spread (slowest round over fastest, less 1), speedup (over the baseline in the same round: median, low,
high); limit_ms, limit_binds, percent_of_limit; max_abs_err, max_rel_err, top1_match, agrees, tolerance.
"""

import json
from contextlib import ExitStack
from pathlib import Path

from bench import plots
from bench.agreement import PRECISIONS
from bench.units import duration, percent, shape_name, times
from bench.verdict import headline_shape, noise_floor, paired_variants, sentence, timed, worst_error
from gpt.files import atomic_output

TEMPLATES = Path(__file__).parent / "templates"
COLUMNS = ("engine", "median", "spread", "× eager", "of limit", "error", "top-1")


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
    """The comparison as lines for a terminal, one block a shape."""
    blocks = []
    for shape in shapes_of(results):
        rows = rows_at(results, shape)
        lines = [_columns(results), *(cells_of(row) for row in rows if row["status"] == "timed")]
        widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
        limit = f"limit {duration(rows[0]['limit_ms'])}, by {rows[0]['limit_binds']}"
        block = [f"{rows[0]['phase']} {shape_name(shape)} · {rows[0]['threads']} threads · {limit}"]
        block += ["  " + "  ".join(_aligned(line, widths)) for line in lines]
        block += [f"  {row['label']}: {row['status']}: {row['reason']}" for row in rows if row["status"] != "timed"]
        blocks.append("\n".join(block))
    return "\n\n".join(blocks)


def shapes_of(results: dict) -> list[tuple[int, int]]:
    """The (B, T) of the rows, in their order."""
    return list(dict.fromkeys((row["B"], row["T"]) for row in results["rows"]))


def rows_at(results: dict, shape: tuple[int, int]) -> list[dict]:
    """The rows of one shape, fastest first, those without a time last."""
    rows = [row for row in results["rows"] if (row["B"], row["T"]) == shape]
    return sorted(rows, key=lambda row: row["median_ms"] or float("inf"))


def cells_of(row: dict) -> list[str]:
    """A timed row as the text of COLUMNS."""
    speedup = row["speedup"]
    return [
        row["label"],
        duration(row["median_ms"]),
        "–" if row["spread"] is None else f"{100 * row['spread']:.1f} %",
        f"{times(speedup['median'])} ({times(speedup['low'])}–{times(speedup['high'])})" if speedup else "–",
        percent(row["percent_of_limit"]),
        f"{row['max_rel_err']:.1e}",
        f"{100 * row['top1_match']:.4g} %",
    ]


def _columns(results: dict) -> list[str]:
    return [name.replace("eager", results["baseline"]) for name in COLUMNS]


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
    environment.filters |= {"duration": duration, "shape": shape_name, "percent": percent}
    return environment.get_template(template).render(_view(results, with_plots=template.startswith("report.html")))


def _view(results: dict, with_plots: bool) -> dict:
    """What the templates show."""
    shapes = shapes_of(results)
    view = {
        "results": results,
        "sentence": sentence(results),
        "columns": _columns(results),
        "shapes": shapes,
        "rows_at": {shape: rows_at(results, shape) for shape in shapes},
        "cells_of": cells_of,
        "headline": headline_shape(results),
        "pairs": paired_variants(results),
        "worst": worst_error(results),
        "engines": list(dict.fromkeys((row["label"], row["summary"]) for row in results["rows"])),
        "tolerance_reasons": {row["dtype"]: PRECISIONS[row["dtype"]].reason for row in results["rows"]},
        "noise": noise_floor(results),
        "odd": [
            shape
            for shape in dict.fromkeys((each["B"], each["T"]) for each in results["checks"])
            if shape not in shapes
        ],
        "plots": {},
    }
    if with_plots:
        view["plots"] = {
            "latency": {shape: plots.latency(rows_at(results, shape), results["baseline"]) for shape in shapes},
            "errors": plots.errors(timed(results)) if timed(results) else None,
            "pairs": plots.before_after(view["pairs"]) if view["pairs"] else None,
        }
    return view
