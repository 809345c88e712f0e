"""Draws the report's plots as SVG that inherits text colour and font from the page, for light and dark themes."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from bench.report.format import duration, factor, percent
from bench.report.summary import limited, name_of, rounds_ms

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

INK = "#010203"  # placeholder, replaced by currentColor in the SVG
FIRST, BASELINE, OTHER, LIMIT = "#2f81f7", "#d08700", "#8590a2", "#e5484d"  # legible on white and near-black
WIDTH_IN = 5.4
CHARACTER_IN = 0.08  # the width of one in a label, on average
PALETTE = ("#2f81f7", "#d08700", "#3fa55b", "#a371f7", "#d2568c", "#1aa7b8", "#8590a2", "#b35900", "#6b7a2f")
OFF_SCALE = 30  # an engine this many times slower than the fastest is drawn off the scale
STYLE: "dict[RcKeyType, Any]" = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "ytick.major.size": 0,
    "grid.color": OTHER,
    "grid.alpha": 0.25,
    "savefig.transparent": True,
}


def latency(rows: list[dict], baseline: str) -> str | None:
    """Plot the medians of one work, fastest on top, with the range of the rounds and the limit, in ms on a log axis.

    An engine more than OFF_SCALE times slower than the fastest would compress the others, so its bar leaves the plot.
    """
    rows = [row for row in rows if row["status"] == "timed"]
    if not rows:
        return None
    with _drawing(len(rows), f"Milliseconds a {rows[0]['unit']}, by engine") as (axes, done):
        limit = limited(rows)["limit_ms"]
        fitting = [row for row in rows if row["median_ms"] <= OFF_SCALE * rows[0]["median_ms"]]
        right = 1.3 * max(2 * limit, *(min(max(rounds_ms(row)), 3 * row["median_ms"]) for row in fitting))
        for y, row in enumerate(rows):
            color = FIRST if y == 0 else BASELINE if row["label"] == baseline else OTHER
            medians = rounds_ms(row)
            axes.plot([limit, row["median_ms"]], [y, y], color=color, alpha=0.35, linewidth=5, solid_capstyle="butt")
            axes.plot([min(medians), max(medians)], [y, y], color=color, linewidth=2, marker="|", markersize=10)
            axes.plot(row["median_ms"], y, "o", color=color, markersize=8)
            if row not in fitting:
                axes.plot(right, y, ">", color=color, markersize=8, clip_on=False)
            _right(axes, y, duration(row["median_ms"]), 1.27, bold=y == 0)
            _right(axes, y, percent(row["percent_of_limit"]), 1.47, bold=y == 0)
        axes.axvline(limit, color=LIMIT, linewidth=1.6, linestyle=(0, (4, 2)))
        axes.set_xscale("log")
        axes.set_xlim(min(limit, rows[0]["median_ms"]) / 1.25, right)
        _label_rows(axes, [name_of(row) for row in rows])
        heading: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "fontsize": 9, "alpha": 0.75}
        axes.text(1.27, -0.85, "median", ha="right", **heading)
        axes.text(1.47, -0.85, "of limit", ha="right", **heading)
        axes.text(limit, -0.85, f" limit {duration(limit)}", color=LIMIT, fontsize=9)
        legend = f"ms a {rows[0]['unit']}, log scale; bars reach from the fastest to the slowest round"
        axes.set_xlabel(legend, fontsize=9, alpha=0.75)
    return done[0]


def errors(rows: list[dict]) -> str:
    """Plot each engine's largest error over the largest logit, beside its own tolerance, on a log axis."""
    largest: dict[str, tuple[float, float]] = {}
    for row in rows:
        error, tolerance = largest.get(row["label"], (0.0, row["tolerance"]))
        largest[row["label"]] = max(error, row["max_rel_err"]), min(tolerance, row["tolerance"])
    smallest = min(error for error, _ in largest.values() if error > 0) if any(e for e, _ in largest.values()) else 1e-9
    with _drawing(len(largest), "Largest error of each engine") as (axes, done):
        order = sorted(largest.items(), key=lambda item: item[1][0])
        for y, (_, (error, tolerance)) in enumerate(order):
            color = FIRST if error <= tolerance else LIMIT
            axes.plot([smallest / 3, max(error, smallest / 3)], [y, y], color=color, alpha=0.3, linewidth=5)
            axes.plot(max(error, smallest / 3), y, "o", color=color, markersize=8)
            axes.plot([tolerance, tolerance], [y - 0.4, y + 0.4], color=LIMIT, linewidth=1.6)
            _right(axes, y, f"{error:.1e}", 1.3)
        tolerance = max(value for _, value in largest.values())
        axes.text(tolerance, -0.85, f"tolerance, up to {tolerance:.1e} ", color=LIMIT, fontsize=9, ha="right")
        axes.set_xscale("log")
        axes.set_xlim(smallest / 3, max(tolerance, max(e for e, _ in largest.values())) * 2)
        _label_rows(axes, [label for label, _ in order])
        axes.set_xlabel("largest |difference| over largest |logit|, log scale", fontsize=9, alpha=0.75)
    return done[0]


def shares(rows: list[dict]) -> str:
    """Plot the share of the limit that each engine reaches at each work, in the order of the works."""
    works = list(dict.fromkeys(row["work"] for row in rows))
    by_engine: dict[str, list[dict]] = {}
    for row in rows:
        by_engine.setdefault(name_of(row), []).append(row)
    order = sorted(by_engine.items(), key=lambda item: -max(row["percent_of_limit"] for row in item[1]))
    with _drawing(9, "Share of the limit, by engine and work") as (axes, done):
        for number, (name, timed) in enumerate(order):
            color = PALETTE[number % len(PALETTE)]
            x, y = [works.index(row["work"]) for row in timed], [row["percent_of_limit"] for row in timed]
            axes.plot(x, y, "o-", color=color, markersize=5, linewidth=1.8, label=name)
        axes.axhline(100, color=LIMIT, linewidth=1.6, linestyle=(0, (4, 2)))
        axes.set_xticks(range(len(works)), works, rotation=45, ha="right", fontsize=8.5)
        axes.set_ylim(0, max(105, *(row["percent_of_limit"] for row in rows)))
        axes.grid(axis="y")
        axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=9)
        axes.set_ylabel("% of the limit", fontsize=9, alpha=0.75)
    return done[0]


def before_after(pairs: list[dict]) -> str:
    """Plot an engine's first and last variant at each work and the speedup, in ms on a log axis."""
    with _drawing(len(pairs), "Before and after optimisation", row_in=0.62) as (axes, done):
        for y, pair in enumerate(pairs):
            before, after = pair["before"], pair["after"]
            arrow = {"arrowstyle": "-|>", "color": FIRST, "linewidth": 2, "shrinkA": 6, "shrinkB": 6, "alpha": 0.6}
            axes.annotate("", (after["median_ms"], y), (before["median_ms"], y), arrowprops=arrow)
            axes.plot(before["median_ms"], y, "o", color=OTHER, markersize=8)
            axes.plot(after["median_ms"], y, "o", color=FIRST, markersize=8)
            shorter, longer = sorted((before["median_ms"], after["median_ms"]))
            for ms, side, away in (
                (shorter, "right", -2),
                (longer, "left", 2),
            ):  # outward, so that close labels do not overlap
                axes.annotate(duration(ms), (ms, y), xytext=(away, 9), textcoords="offset points", ha=side, fontsize=9)
            _right(axes, y, f"{factor(pair['ratio'])}× faster", 1.47, bold=True)
        times = [pair[key]["median_ms"] for pair in pairs for key in ("before", "after")]
        axes.set_xscale("log")
        axes.set_xlim(min(times) / 2, max(times) * 2)
        engine = pairs[0]["before"]["engine"]
        _label_rows(axes, [pair["work"] for pair in pairs])
        legend = f"{engine} {pairs[0]['before']['variant']} → {pairs[0]['after']['variant']}, ms, log scale"
        axes.set_xlabel(legend, fontsize=9, alpha=0.75)
    return done[0]


@contextmanager
def _drawing(rows: int, label: str, row_in: float = 0.34) -> "Iterator[tuple[Axes, list[str]]]":
    """Yield axes for a number of rows, and a list to which the finished SVG is appended when the block ends."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    done: list[str] = []
    with rc_context(STYLE):
        height = row_in * rows + 0.85
        figure = Figure(figsize=(WIDTH_IN, height))
        axes = figure.add_axes((0.2, 0.5 / height, 0.53, (row_in * rows + 0.05) / height))
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        yield axes, done
        done.append(_svg(figure, label))


def _svg(figure: "Figure", label: str) -> str:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes = figure.axes[0]
    if axes.get_xscale() == "log":
        low, high = axes.get_xlim()
        small = high / low < 100
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if small else (1,), numticks=12))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.tick_params(axis="x", labelsize=9)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL).replace(INK, "currentColor")
    # Drop matplotlib's font family from each text's style, so that the page's font applies.
    text = re.sub(r"font: (?:(bold|\d+) )?([\d.]+)px [^;\"]*", _font, text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def _font(match: re.Match[str]) -> str:
    weight = f"font-weight: {match[1]}; " if match[1] else ""
    return f"{weight}font-size: {match[2]}px"


def _label_rows(axes: "Axes", labels: list[str]) -> None:
    """Write a label beside each row; the axes begin where the longest one ends."""
    box, left_in = axes.get_position(), CHARACTER_IN * max(map(len, labels)) + 0.15
    left = max(box.x0, left_in / WIDTH_IN)
    axes.set_position((left, box.y0, box.x1 - left, box.height))
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.45, -0.6)


def _right(axes: "Axes", y: float, text: str, x: float, bold: bool = False) -> None:
    """Write text in a column to the right of the axes."""
    weight = "bold" if bold else "normal"
    axes.text(x, y, text, transform=axes.get_yaxis_transform(), ha="right", va="center", fontweight=weight)
