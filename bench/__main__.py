"""python -m bench
python -m bench --seeded gpt2 --minutes 3
python -m bench --engine onnxruntime --engine tvm --phases prefill --shapes 1x64 8x64
python -m bench --phases decode --contexts 32 63
python -m bench --seeded gpt2 --precision all --sweep --minutes 6
python -m bench --precision int8 --text input.txt
python -m bench --odd --engine tvm
python -m bench --onnx theirs.onnx

Compare every engine on the same work: check that its numbers are right, time it, and write results.json, report.md
and report.html beside the model.
"""

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is one line too
    from gpt.cli import run_main

    run_main("bench.__main__")

import datetime
import shlex
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Literal

import tyro

from bench.backends import Candidate, candidates_of, find_candidates, refuse_absent
from bench.correctness import loss, reference
from bench.correctness.agreement import PRECISIONS
from bench.harness.machine import checked_threads, describe_machine
from bench.harness.plan import ROUNDS, Plan, works_of
from bench.harness.race import compare
from bench.harness.work import phases_of
from bench.models import external
from bench.models.artifacts import Artifacts
from bench.models.build import CannotMake, choose_artifacts, config_of, prepare, remake_stale
from bench.models.shape import Model, shape_of
from bench.report import cliffs
from bench.report.build_stats import compiled_of
from bench.report.page import RESULTS, table_text, write_report
from bench.report.summary import GROUPED, in_group, statements
from bench.roofline.bounds import Roofline, best_of
from gpt.arguments import parse_settings
from gpt.cli import UserError
from gpt.files import hold_output, sha256_file
from gpt.version import PROJECT, project_version

BASELINE, BASELINE_OF_ONNX = "eager", "onnxruntime"  # the label that speed-ups in float32 are relative to
OURS = "tvm", "O3"  # engine and variant in float32 that they are relative to in fewer bits
SWEEP_B, SWEEP_T = (1, 4), (64, 128, 256, 512, 1024)
SWEEP_CONTEXTS = (128, 900)
MANY_SHAPES = "a sweep has many shapes, and it needs a module for each; --engine {engine} asks for it all the same"


@dataclass(frozen=True)
class BenchConfig:
    """One comparison of all engines, or of those asked for."""

    artifacts: Path = Path("artifacts")  # the folder of the model; the report is written there too
    seeded: str | None = None  # compare on a model with random weights: demo, char, gpt2 or bigram
    onnx: Path | None = None  # compare on somebody's ONNX file, as it is (python -m export.inspect says what is in it)
    engine: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # only this engine; may be given again
    precision: tuple[Literal["fp32", "bf16", "int8", "int4", "all"], ...] = ("fp32",)  # format of products; a race each
    phases: tuple[str, ...] = ()  # prefill, decode, generate; by default all that the model has
    shapes: tuple[str, ...] = ()  # BxT of each prefill, as 1x64 8x64; by default three that suit the model
    contexts: tuple[int, ...] = ()  # tokens in the cache for decode; by default 32, 128 and the longest, as they fit
    sweep: tyro.conf.FlagCreatePairsOff[bool] = False  # B of 1, 4 by T of 64 … 1024, contexts of 128, 900, as they fit
    odd: tyro.conf.FlagCreatePairsOff[bool] = False  # prefill at T of 1, 17, 63, … and neighbours: is there a cliff
    text: Path | None = None  # a text or a folder of gpt.corpus, for the loss; by default Python's sources, if known
    threads: int | None = None  # threads of every engine; by default the physical cores that this process may use
    minutes: float = 0.75  # minutes of timing at each precision; loading, compiling and checking come on top
    remake: tyro.conf.FlagCreatePairsOff[bool] = False  # make again what is damaged or not of the model that is there
    seed: int | None = None  # seed of the random ids; by default a fresh one, which the results record


def run_bench(config: BenchConfig) -> dict:
    """Run the comparison, write the report files and return the results. Raises UserError for a user's mistake."""
    by_precision = _races_of(config)
    artifacts, words = choose_artifacts(config.artifacts, config.seeded, config.onnx)
    with hold_output(artifacts.folder / RESULTS):
        if config.remake:
            remake_stale(artifacts)
        return _run_held(config, by_precision, artifacts, words)


def _run_held(config: BenchConfig, by_precision: dict[str, list[Candidate]], artifacts: Artifacts, words: str) -> dict:
    """Run the comparison while no other process can write the report."""
    model, reference_class = config_of(artifacts), external.Reference if config.onnx else reference.Reference
    plan = _plan_of(config, model)
    by_precision = {
        precision: those_that_can(candidates, artifacts, plan.phases, plan.prompts)
        for precision, candidates in by_precision.items()
    }
    refuse_absent(config.engine, list(chain.from_iterable(by_precision.values())))
    if not any(by_precision.values()):
        raise UserError(f"none of the engines asked for has a phase of {', '.join(plan.phases)}")
    prepare(artifacts, [])
    held_out = loss.find_held_out(artifacts, config.text)
    baseline = BASELINE_OF_ONNX if config.onnx else BASELINE
    races = {}
    for precision, candidates in by_precision.items():
        print(f"comparing {len(candidates)} engines on {words}, {precision}, {plan.threads} threads", file=sys.stderr)
        race = replace(plan, precision=precision, baseline=baseline if precision == "fp32" else " ".join(OURS))
        result = compare(
            artifacts, candidates, race, f"{reference_class.__module__}:{reference_class.__name__}", held_out.windows
        )
        result["compiled"] = compiled_of(artifacts, candidates, race.works, precision)
        races[precision] = race, result
    results = {
        "machine": describe_machine(),
        "model": {
            "words": words,
            "config": asdict(model),
            "about": shape_of(model).about,
            "source": "ONNX file" if config.onnx else "Checkpoint",
            "sha256": sha256_file(config.onnx or artifacts.checkpoint),
        },
        "truth": reference_class.summary,
        "measure": reference_class.measure,
        "judges": reference_class.judges,
        "text": held_out.words,
        "phases": list(plan.phases),
        "rounds": ROUNDS,
        "threads": plan.threads,
        "minutes": plan.minutes,
        "seed": plan.seed,
        "created": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["python", "-m", "bench", *sys.argv[1:]]),
        **_merged(races),
    }
    report = write_report(results, artifacts.folder)
    for precision in results["precisions"]:
        group = in_group(results, precision)
        print("\n".join([f"{precision}:", *statements(group), "", table_text(group), ""]))
    print(f"report: {report}")
    return results


def those_that_can(
    candidates: Iterable[Candidate],
    artifacts: Artifacts,
    phases: tuple[str, ...],
    prompts: tuple[tuple[int, int], ...] = (),
) -> list[Candidate]:
    """Make the files of the candidates that have one of the phases, and return those candidates.

    A candidate whose files cannot be made of this model is returned as absent. prompts: the shapes (B, T) of prefill.
    Raises UserError for a file that is not of this model.
    """
    found = []
    for each in candidates:
        if not set(each.phases) & set(phases):
            continue
        able = external.that_can(each, artifacts) if artifacts.onnx else each
        if not able.absent:
            try:
                prepare(artifacts, [able], phases, prompts)
            except CannotMake as error:
                able = replace(able, absent=str(error))
        found.append(able)
    return found


def _races_of(config: BenchConfig) -> dict[str, list[Candidate]]:
    """List the candidates of each precision asked for; races in fewer bits include our engine in float32."""
    every = (name for name in PRECISIONS if find_candidates((), [name]))  # those that an engine computes in on a CPU
    precisions = tuple(every if "all" in config.precision else dict.fromkeys(config.precision))
    found = [unless_many_shapes(each, config) for each in find_candidates(config.engine, precisions)]
    ours = [each for each in candidates_of(OURS[0]) if (each.engine, each.variant) == OURS]
    if config.engine and OURS[0] not in config.engine:
        ours = []
    return {
        precision: [each for each in found if each.precision == precision] + (ours if precision != "fp32" else [])
        for precision in precisions
    }


def unless_many_shapes(candidate: Candidate, config: BenchConfig) -> Candidate:
    """Return the candidate, as absent if it is static, the shapes are many, and it was not asked for."""
    if not candidate.static or config.engine or not (config.sweep or config.odd):
        return candidate
    return replace(candidate, absent=candidate.absent or MANY_SHAPES.format(engine=candidate.engine))


def _plan_of(config: BenchConfig, model: Model) -> Plan:
    """Make the plan of all races, but for their precision. Raises UserError for values that make no sense."""
    phases = config.phases
    shapes, contexts = list(config.shapes), list(config.contexts)
    if config.odd:
        phases = phases or ("prefill",)
    compared = phases or phases_of(model)
    if config.sweep:
        if model.block_size < SWEEP_T[0]:
            raise UserError(f"sweep: its shapes begin at {SWEEP_T[0]} tokens, and this model takes {model.block_size}")
        if "prefill" in compared:
            shapes += [f"{B}x{T}" for B in SWEEP_B for T in SWEEP_T if model.block_size >= T]
        if "decode" in compared:
            contexts += [context for context in SWEEP_CONTEXTS if context < model.block_size]
    if config.odd:
        shapes += [f"1x{T}" for T in cliffs.sizes(model)]
    works = works_of(model, phases, tuple(dict.fromkeys(shapes)), tuple(dict.fromkeys(contexts)))
    plan = Plan(model, works, checked_threads(config.threads), config.minutes, config.odd)
    return plan if config.seed is None else replace(plan, seed=config.seed)


def _merged(races: dict[str, tuple[Plan, dict]]) -> dict:
    """Merge the results of the races of all precisions."""
    found = [result for _, result in races.values()]
    limits: dict[str, Roofline] = {}
    for precision, measured in chain.from_iterable(result["limits"].items() for result in found):
        limit = Roofline(**measured)
        limits[precision] = best_of(limits.get(precision, limit), limit)
    return {
        "precisions": list(races),
        "baselines": {precision: plan.baseline for precision, (plan, _) in races.items()},
        "limits": {precision: asdict(limit) for precision, limit in limits.items()},
        **{name: list(chain.from_iterable(result[name] for result in found)) for name in GROUPED},
        "versions": {
            PROJECT: project_version(),
            **dict(chain.from_iterable(result["versions"].items() for result in found)),
        },
        "seconds": sum(result["seconds"] for result in found),
    }


def main() -> None:
    """The command line. Exits with 1 if an engine disagrees with the reference."""
    results = run_bench(parse_settings(BenchConfig, prog="python -m bench"))
    if any(row["agrees"] is False for row in results["rows"]):
        sys.exit(1)
