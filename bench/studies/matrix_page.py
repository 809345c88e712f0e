"""Formats what became of the files of `foreign_recipes` as a part of docs/support-matrix.md."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from tabulate import tabulate

from bench.studies.foreign_recipes import KINDS, PLAIN, Recipe
from bench.studies.matrix import Result
from bench.studies.matrix_cell import CRASHED, REFUSED, RIGHT, UNJUDGED, WRONG, tolerance_of

# The columns of the matrix, each with the variants that it holds.
COLUMNS = {
    PLAIN: (PLAIN,),
    "simplified": KINDS[0],
    "fp16": KINDS[1],
    "int8": ("int8",),
    "QDQ": ("qdq",),
    "int4": ("int4",),
    "ORT": ("ort",),
    "fused": ("fused",),
}
TEXT = """## Files that others exported

Tiny models with random weights, nanogpt, build-nanogpt and mingpt in the layout of their repositories and the others
of transformers, are exported as their users do, changed by the tools that their users take, compiled as they
are by `python -m tvm_frontend.compile FILE`, and run. A number is the largest error of any output over all runs of a
file, divided by the largest number of that output; the reference is ONNX Runtime on the same file, with its own
optimisations off, as they change what QDQ files compute. The runs are of one token, of odd lengths and of the longest;
with padding behind and before, where there is a mask; of one and four tokens after a past, and of text from a prompt
on, where there is a cache.

{judged} files run in ONNX Runtime. **{right} of them ({share:.1%}) compile and agree, {wrong} give other numbers,
{refused} are refused**{crashed}. {unjudged} more files cannot be judged, as ONNX Runtime refuses them itself.

- `dynamo` and `torchscript` are torch.onnx's exporters: of token ids alone, with `-mask` also of an attention mask,
  with `-past` of keys and values too. `optimum` is Optimum's `text-generation`, `optimum-past` its
  `text-generation-with-past`.
- `simplified` is by onnxsim or onnxslim; `fp16` by ONNX Runtime's or onnxconverter_common's converter; `int8`, `QDQ`
  and `int4` by ONNX Runtime's quantize_dynamic, quantize_static and MatMulNBitsQuantizer; `ORT` is what ONNX Runtime
  wrote down of its extended optimisations, `fused` what its optimiser of transformers made. Where there are two tools
  for the same, they take turns. int8 weights have 7 bits: with 8, sums saturate in ONNX Runtime on CPUs without VNNI.
- Agreement is {fp32:.0e} for fp32 and int4, {fp16:.0e} for fp16, and {int8:.0e} for int8 and QDQ, where a sum that
  differs in its last bit may round an activation to the next of 255 steps.
- A percentage is the share of the FLOPs in products that this project's own kernels do; TVM's code does the rest.
- `{wrong_mark}` marks other numbers, `no` a refusal with its number below, `–` a file that ONNX Runtime refuses. An
  empty cell is a file that was not made.
- Versions: {versions}.
"""
WRONG_MARK = "WRONG"


def foreign_part(results: Iterable[tuple[Recipe, Result]], refused: Mapping[str, str], versions: str) -> str:
    """Format the part: counts, errors by model and exporter, all cells, and the words of all refusals.

    refused: the words of exporters and tools by the names of the files that they did not make.
    """
    results = list(results)
    counts = Counter(result.outcome.kind for _, result in results)
    judged = sum(counts.values()) - counts[UNJUDGED]
    crashed = f", {counts[CRASHED]} end in an error that nobody foresaw" if counts[CRASHED] else ""
    numbers: dict[str, int] = {}
    text = TEXT.format(
        judged=judged,
        right=counts[RIGHT],
        share=counts[RIGHT] / (judged or 1),
        wrong=counts[WRONG],
        refused=counts[REFUSED],
        crashed=crashed,
        unjudged=counts[UNJUDGED],
        wrong_mark=WRONG_MARK,
        versions=versions,
        fp32=tolerance_of(PLAIN),
        fp16=tolerance_of("fp16"),
        int8=tolerance_of("int8"),
    )
    return "\n".join(
        [
            text,
            "### By model and exporter",
            "",
            "The files that agree, of those that ONNX Runtime runs, and the largest error of those in fp32 and int4.",
            "",
            _by_model(results),
            "",
            "### By variant",
            "",
            _by_variant(results),
            "",
            "### All files",
            "",
            _cells(results, numbers),
            "",
            "### Their refusals",
            "",
            *(f"{number}. {said}" for said, number in numbers.items()),
            "",
            "### Files that are not there",
            "",
            "What exporters and tools said, and how many files each message cost.",
            "",
            _table(_refusals_of_tools(refused), "files", "such as", "message"),
            "",
        ]
    )


def _by_model(results: Sequence[tuple[Recipe, Result]]) -> str:
    exporters = list(dict.fromkeys(recipe.exporter for recipe, _ in results))
    rows = []
    for model in dict.fromkeys(recipe.model for recipe, _ in results):
        row = [model]
        for exporter in exporters:
            row.append(_summary([each for each in results if (each[0].model, each[0].exporter) == (model, exporter)]))
        rows.append(row)
    return _table(rows, "model", *exporters)


def _by_variant(results: Sequence[tuple[Recipe, Result]]) -> str:
    rows = []
    for column, variants in COLUMNS.items():
        of_it = [each for each in results if each[0].variant in variants]
        right = [result.outcome.error for _, result in of_it if result.outcome.kind == RIGHT]
        rows.append([column, _share(of_it), short(max(right)) if right else ""])
    return _table(rows, "variant", "agree", "largest error")


def _summary(results: Sequence[tuple[Recipe, Result]]) -> str:
    """Say how many of some files agree, and their largest error; wrong ones are named as such."""
    if not results:
        return ""
    kinds = Counter(result.outcome.kind for _, result in results)
    exact = [
        result.outcome.error
        for recipe, result in results
        if result.outcome.kind == RIGHT and tolerance_of(recipe.variant) == tolerance_of(PLAIN)
    ]
    words = [_share(results), short(max(exact)) if exact else ""]
    words += [f"{kinds[WRONG]} {WRONG_MARK}"] if kinds[WRONG] else []
    return " ".join(filter(None, words))


def _share(results: Sequence[tuple[Recipe, Result]]) -> str:
    kinds = Counter(result.outcome.kind for _, result in results)
    return f"{kinds[RIGHT]}/{sum(kinds.values()) - kinds[UNJUDGED]}"


def _cells(results: Sequence[tuple[Recipe, Result]], numbers: dict[str, int]) -> str:
    """Format a row for each model, exporter and opset. numbers: gets each refusal with its number."""

    def cell(result: Result) -> str:
        outcome = result.outcome
        if outcome.kind == RIGHT:
            covered = "" if outcome.coverage is None else f", {outcome.coverage:.0%}"
            return f"{short(outcome.error)}{covered}"
        if outcome.kind == WRONG:
            return f"{WRONG_MARK} {short(outcome.error)}"
        said = numbers.setdefault(general(outcome.words), len(numbers) + 1)
        return f"{'–' if outcome.kind == UNJUDGED else 'no' if outcome.kind == REFUSED else 'error'} ({said})"

    rows: dict[tuple[str, str, int], dict[str, str]] = {}
    column_of = {variant: column for column, variants in COLUMNS.items() for variant in variants}
    for recipe, result in results:
        row = rows.setdefault((recipe.model, recipe.exporter, recipe.opset), {})
        row[column_of[recipe.variant]] = cell(result)
    table = [[*map(str, row), *(cells.get(column, "") for column in COLUMNS)] for row, cells in rows.items()]
    return _table(table, "model", "exporter", "opset", *COLUMNS)


def general(words: str) -> str:
    """Leave out of a message what differs from file to file: paths and names of nodes."""
    words = re.sub(r"\S*/\S+\.onnx", "the file", words)
    words = re.sub(r"node '[^']*'", "a node", words)
    words = re.sub(r"Name: ?'[^']*'", "a node", words)
    return words.replace("|", "\\|").replace("\n", " ")


def _refusals_of_tools(refused: Mapping[str, str]) -> list[list[str]]:
    names: dict[str, list[str]] = {}
    for name, words in refused.items():
        names.setdefault(general(words), []).append(name.removesuffix(".onnx"))
    return [[str(len(of_it)), of_it[0], words] for words, of_it in names.items()]


def short(error: float) -> str:
    """Format an error with one digit: 3e-7."""
    return f"{error:.0e}".replace("e-0", "e-").replace("e+0", "e+") if error else "0"


def _table(rows: list[list[str]], *heads: str) -> str:
    return tabulate(rows, heads, "pipe", disable_numparse=True)
