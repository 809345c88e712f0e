"""What the results come to: the sentence at the top of the report, and the numbers behind it."""

from statistics import median

from bench.units import duration, percent, shape_name

Rows = list[dict]


def timed(results: dict) -> Rows:
    """The rows that hold a time."""
    return [row for row in results["rows"] if row["status"] == "timed"]


def headline_shape(results: dict) -> tuple[int, int]:
    """The (B, T) that the verdict is about: the one with the most tokens that was timed, the last of equals."""
    rows = timed(results) or results["rows"]
    return max(((row["B"], row["T"]) for row in reversed(rows)), key=lambda shape: shape[0] * shape[1])


def medians_by_round(row: dict) -> list[float | None]:
    """The median of each round in ms, None for a round without samples."""
    found, start = [], 0
    for count in row["samples_by_round"]:
        found.append(median(row["samples_ms"][start : start + count]) if count else None)
        start += count
    return found


def rounds_ms(row: dict) -> list[float]:
    """The median of each round that has samples, in ms."""
    return [value for value in medians_by_round(row) if value is not None]


def paired_variants(results: dict) -> list[dict]:
    """Engines timed in more than one variant: the first and the last of them at each shape, and the ratio."""
    pairs = []
    for row in timed(results):
        same = [each for each in timed(results) if all(each[key] == row[key] for key in ("engine", "B", "T"))]
        if row is same[0] and len(same) > 1:
            before, after = same[0], same[-1]
            ratio = before["median_ms"] / after["median_ms"]
            pairs.append({"before": before, "after": after, "shape": (row["B"], row["T"]), "ratio": ratio})
    return pairs


def noise_floor(results: dict) -> float | None:
    """The median of the engines' spreads, over all shapes: what they differ from themselves by, between rounds."""
    spreads = [row["spread"] for row in timed(results) if row["spread"] is not None]
    return median(spreads) if spreads else None


def worst_error(results: dict) -> dict | None:
    """The timed row that comes closest to its tolerance."""
    return max(timed(results), key=lambda row: row["max_rel_err"] / row["tolerance"], default=None)


def sentence(results: dict) -> str:
    """The comparison in few sentences: who is fastest and how near the limit, and whether the numbers are right."""
    shape = headline_shape(results)
    rows = [row for row in timed(results) if (row["B"], row["T"]) == shape]
    if not rows:
        return "No engine could be timed: see the reasons in the table. " + _agreement(results)
    first, *others = sorted(rows, key=lambda row: row["median_ms"])
    share = f"{percent(first['percent_of_limit'])} of what {_cores(first['threads'])} of this machine can do"
    lead = f"At {shape_name(shape)} {_lead(first, others)}{_against_baseline(first, results)} {share}."
    pairs = [_gain(pair) for pair in paired_variants(results) if pair["shape"] == shape]
    return " ".join([lead, *pairs, _agreement(results)])


def _lead(first: dict, others: Rows) -> str:
    time = duration(first["median_ms"])
    if not others:
        return f"{first['label']} takes {time},"
    second = others[0]
    if _ever_behind(first, second):
        return f"{first['label']} takes {time}, level with {second['label']} (neither won every round),"
    return f"{first['label']} is fastest with {time} (next: {second['label']}, {duration(second['median_ms'])}),"


def _gain(pair: dict) -> str:
    before, after = (f"{duration(pair[key]['median_ms'])} at {pair[key]['variant']}" for key in ("before", "after"))
    return f"Optimisation makes {pair['before']['engine']} {pair['ratio']:.3g} times as fast: {before}, {after}."


def _ever_behind(first: dict, second: dict) -> bool:
    """Whether the second was as fast in any round that both took part in."""
    pairs = zip(medians_by_round(first), medians_by_round(second), strict=True)
    return any(ours >= theirs for ours, theirs in pairs if ours is not None and theirs is not None)


def _against_baseline(first: dict, results: dict) -> str:
    speedup = first["speedup"]
    if not speedup or first["engine"] == results["baseline"]:
        return " at"
    return f" {speedup['median']:.2g} times as fast as {results['baseline']} and at"


def _agreement(results: dict) -> str:
    wrong = sorted({row["label"] for row in results["rows"] if row["agrees"] is False})
    if wrong:
        return f"Not to be trusted: {', '.join(wrong)} (disagrees with the reference and was not timed)."
    worst = worst_error(results)
    if worst is None:
        return ""
    count = len({row["label"] for row in timed(results)})
    return (
        f"{'It agrees' if count == 1 else f'All {count} agree'} with eager in float64: the largest error is "
        f"{worst['max_rel_err']:.1e} of the largest logit, rounding explains {worst['tolerance']:.1e}."
    )


def _cores(threads: int) -> str:
    return "one core" if threads == 1 else f"{threads} cores"
