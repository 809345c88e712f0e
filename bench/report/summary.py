"""Summarises results: the statements at the top of the report, and the rows and numbers behind them."""

from collections import Counter
from statistics import median

from bench.report.format import duration, percent

Rows = list[dict]
GROUPED = ("rows", "checks", "losses", "compiled")  # the lists of the results whose entries belong to one precision


def timed(results: dict) -> Rows:
    """Return the rows that were timed."""
    return [row for row in results["rows"] if row["status"] == "timed"]


def in_group(results: dict, precision: str) -> dict:
    """Restrict the results to one precision, with its `precision` and `baseline`."""
    parts = {name: [each for each in results[name] if each["group"] == precision] for name in GROUPED}
    return results | parts | {"precision": precision, "baseline": results["baselines"][precision]}


def present(results: dict) -> Rows:
    """Return the rows of engines that can run here; `absent_engines` reports the others once, outside the tables."""
    return [row for row in results["rows"] if row["status"] != "absent"]


def absent_engines(results: dict) -> dict[str, str]:
    """Map absent engines to the reason: by name, or by label if another variant of the engine is present."""
    here = {row["engine"] for row in present(results)}
    absent = [row for row in results["rows"] if row["status"] == "absent"]
    reasons = {(row["engine"], row["reason"]) for row in absent}
    counts = Counter(engine for engine, _ in reasons)
    return {
        row["engine"] if row["engine"] not in here and counts[row["engine"]] == 1 else row["label"]: row["reason"]
        for row in absent
    }


def phases_in(results: dict) -> list[str]:
    """List the phases of the rows, in order."""
    return list(dict.fromkeys(row["phase"] for row in present(results)))


def works_in(results: dict, phase: str) -> list[str]:
    """List the names of a phase's works, in the order of the rows."""
    return list(dict.fromkeys(row["work"] for row in present(results) if row["phase"] == phase))


def rows_at(results: dict, phase: str, work: str) -> Rows:
    """Return the rows of one work, fastest first, rows without a time last."""
    rows = [row for row in present(results) if (row["phase"], row["work"]) == (phase, work)]
    return sorted(rows, key=lambda row: row["median_ms"] or float("inf"))


def name_of(row: dict) -> str:
    """Return an engine's label, with its precision if that differs from the one that is compared."""
    return row["label"] if row["precision"] == row["group"] else f"{row['label']} ({row['precision']})"


def limited(rows: Rows) -> dict:
    """Return the row whose bound stands for all rows: one of the precision that is compared, if there is one."""
    return next((row for row in rows if row["precision"] == row["group"]), rows[0])


def headline_of(results: dict, phase: str) -> str:
    """Return the work that a phase is summarised by: the timed one of most tokens, the last among equals."""
    rows = [row for row in present(results) if row["phase"] == phase]
    rows = [row for row in rows if row["status"] == "timed"] or rows
    return max(reversed(rows), key=lambda row: row["B"] * (row["T"] + row["context"]))["work"]


def medians_by_round(row: dict) -> list[float | None]:
    """Return the median of each round in ms, None for a round without samples."""
    found, start = [], 0
    for count in row["samples_by_round"]:
        found.append(median(row["samples_ms"][start : start + count]) if count else None)
        start += count
    return found


def rounds_ms(row: dict) -> list[float]:
    """Return the median of each round that has samples, in ms."""
    return [value for value in medians_by_round(row) if value is not None]


def paired_variants(results: dict) -> list[dict]:
    """Pair the first and last variant of engines timed in several variants of a precision, with the ratio, by work."""
    pairs, keys = [], ("engine", "precision", "phase", "work")
    for row in timed(results):
        same = [each for each in timed(results) if all(each[key] == row[key] for key in keys)]
        if row is same[0] and len(same) > 1:
            before, after = same[0], same[-1]
            ratio = before["median_ms"] / after["median_ms"]
            pairs.append({"before": before, "after": after, "phase": row["phase"], "work": row["work"], "ratio": ratio})
    return pairs


def noise_floor(results: dict) -> float | None:
    """Return the median spread over all engines and works: the variation of one engine between rounds."""
    spreads = [row["spread"] for row in timed(results) if row["spread"] is not None]
    return median(spreads) if spreads else None


def worst_error(results: dict) -> dict | None:
    """Return the timed row closest to its tolerance; of the precision that is compared, if there is one."""
    rows = timed(results)
    rows = [row for row in rows if row["precision"] == row["group"]] or rows
    return max(rows, key=lambda row: row["share_of_allowed"], default=None)


def statements(results: dict) -> list[str]:
    """Summarise in a few sentences: the fastest engine of each phase, its share of the bound, and the agreement."""
    found = [_lead_of(results, phase) for phase in phases_in(results)]
    if not timed(results):
        found = ["No engine could be timed: see the reasons below."]
    return [each for each in (*found, *reliability(results)) if each]


def glance(results: dict) -> list[dict]:
    """Collect a table row per phase for its headline work: the fastest engine and the next, None if there is none."""
    lines = []
    for phase in phases_in(results):
        work = headline_of(results, phase)
        rows = [row for row in rows_at(results, phase, work) if row["status"] == "timed"]
        if rows:
            line = {"precision": results["precision"], "phase": phase, "work": work, "first": rows[0]}
            lines.append(line | {"next": next((row for row in rows if row["engine"] != rows[0]["engine"]), None)})
    return lines


def reliability(results: dict) -> list[str]:
    """State the agreement with the reference and the loss on text, the last of `statements`."""
    return [each for each in (_agreement(results), _loss(results)) if each]


def _lead_of(results: dict, phase: str) -> str | None:
    """State the fastest engine of a phase at its headline work; None if none was timed."""
    work = headline_of(results, phase)
    rows = [row for row in rows_at(results, phase, work) if row["status"] == "timed"]
    if not rows:
        return None
    first, *others = rows
    share = f"{percent(first['percent_of_limit'])} of the machine's limit"
    lead = f"{phase.capitalize()}, {work}: {_lead(first, others)}{_against_baseline(first, results)} {share}."
    pairs = [pair for pair in paired_variants(results) if (pair["phase"], pair["work"]) == (phase, work)]
    return " ".join([lead, *(_gain(pair) for pair in pairs)])


def _lead(first: dict, others: Rows) -> str:
    time = _time(first)
    if not others:
        return f"{name_of(first)} takes {time},"
    second = others[0]
    if _ever_behind(first, second):
        return f"{name_of(first)} takes {time}, level with {name_of(second)} (neither won every round),"
    return f"{name_of(first)} is fastest with {time} (next: {name_of(second)}, {duration(second['median_ms'])}),"


def _time(row: dict) -> str:
    """Format a row's median, with its unit of work unless that is a prefill: `0.09 ms a token`."""
    per = " a token" if row["unit"] == "token" else ""
    return duration(row["median_ms"]) + per


def _gain(pair: dict) -> str:
    before, after = (f"{duration(pair[key]['median_ms'])} at {pair[key]['variant']}" for key in ("before", "after"))
    return f"Optimisation makes {pair['before']['engine']} {pair['ratio']:.3g} times as fast: {before}, {after}."


def _ever_behind(first: dict, second: dict) -> bool:
    """Return True if the second was at least as fast in any round that both have."""
    pairs = zip(medians_by_round(first), medians_by_round(second), strict=True)
    return any(ours >= theirs for ours, theirs in pairs if ours is not None and theirs is not None)


def _against_baseline(first: dict, results: dict) -> str:
    speedup = first["speedup"]
    if not speedup or first["label"] == results["baseline"]:
        return " at"
    digits = ".2g" if speedup["median"] < 100 else ",.0f"
    return f" {speedup['median']:{digits}} times as fast as {results['baseline']} and at"


def _agreement(results: dict) -> str:
    wrong = sorted({row["label"] for row in results["rows"] if row["agrees"] is False})
    if wrong:
        return f"Not to be trusted: {', '.join(wrong)} (disagrees with the reference and was not timed)."
    worst = worst_error(results)
    if worst is None:
        return ""
    count = len({row["label"] for row in timed(results)})
    rounded = " of weights rounded as each rounds them" if results["precision"] in ("int8", "int4") else ""
    return (
        f"{'It agrees' if count == 1 else f'All {count} agree'} with {results['truth']}{rounded}: the largest error is "
        f"{worst['max_rel_err']:.1e} of the largest logit, rounding explains {worst['tolerance']:.1e}."
    )


def _loss(results: dict) -> str:
    """State each engine's loss on text over float64's; empty for float32, which loses nothing."""
    found = [each for each in results["losses"] if each["loss"] is not None and each["precision"] == each["group"]]
    if not found or results["precision"] == "fp32":
        return ""
    found.sort(key=lambda each: each["percent_above"])
    said = ", ".join(f"{each['label']} {each['percent_above']:+.2f} %" for each in found)
    return f"Loss on held-out text, against {found[0]['reference']:.4f} nats a token in float64: {said}."
