"""python -m bench
python -m bench --seeded gpt2 --minutes 3
python -m bench --engine onnxruntime --engine tvm --phases prefill --shapes 1x64 8x64
python -m bench --phases decode --contexts 32 63
python -m bench --engine onnxruntime --engine onnxruntime_int8 --engine openvino_int4
python -m bench --onnx theirs.onnx

Compare every engine on the same work: check that its numbers are right, time it, and write results.json, report.md
and report.html beside the model.
"""

import datetime
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from bench import foreign, reference
from bench.backends import find_contenders
from bench.compare import ROUNDS, Plan, compare, works_of
from bench.machine import checked_threads, describe_machine
from bench.prepare import choose_artifacts, config_of, prepare
from bench.report import table_text, write_report
from bench.rows import BASELINE
from bench.verdict import statements
from gpt.cli import UserError, run_command
from gpt.files import sha256_file


@dataclass(frozen=True)
class BenchConfig:
    """One comparison of all engines, or of those asked for."""

    artifacts: Path = Path("artifacts")  # the folder of the model; the report is written there too
    seeded: str | None = None  # compare on a model with random weights: demo, gpt2 or bigram
    onnx: Path | None = None  # compare on somebody else's ONNX file (python -m export.inspect says if it can be used)
    engine: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # only this engine; may be given again
    phases: tuple[str, ...] = ()  # of prefill, decode, generate; by default all that the model has
    shapes: tuple[str, ...] = ()  # of prefill: BxT each, as 1x64 8x64; by default three that suit the model
    contexts: tuple[int, ...] = ()  # of decode: tokens in the cache; by default 32, 128 and the longest, as they fit
    threads: int | None = None  # of every engine; by default the physical cores that this process may use
    minutes: float = 0.75  # for the timing; loading, compiling and checking come on top
    seed: int | None = None  # of the random ids; by default a fresh one, which the results record


def run_bench(config: BenchConfig) -> dict:
    """Run the comparison, write the report files and return the results. Raises UserError for a user's mistake."""
    contenders = find_contenders(config.engine)
    artifacts, words = choose_artifacts(config.artifacts, config.seeded, config.onnx)
    phases, truth = config.phases, reference.Reference
    if config.onnx:
        phases, truth = foreign.checked_phases(config.phases), foreign.Reference
        contenders = foreign.those_that_can(contenders, config.engine, lambda each: prepare(artifacts, [each], phases))
    threads = checked_threads(config.threads)
    print(f"comparing {len(contenders)} engines on {words}, {threads} threads", file=sys.stderr, flush=True)
    chosen = {} if config.seed is None else {"seed": config.seed}
    works = works_of(config_of(artifacts), phases, config.shapes, config.contexts)
    plan = Plan(works, threads, config.minutes, **chosen)
    contenders = [each for each in contenders if set(each.phases) & set(plan.phases)]
    if not contenders:
        raise UserError(f"none of the engines asked for has a phase of {', '.join(plan.phases)}")
    model = prepare(artifacts, contenders, plan.phases)
    results = {
        "machine": describe_machine(),
        "model": {
            "words": words,
            "config": asdict(model),
            "checkpoint_sha256": sha256_file(config.onnx or artifacts.checkpoint),
        },
        "truth": truth.summary,
        "phases": list(plan.phases),
        "baseline": BASELINE,
        "rounds": ROUNDS,
        "threads": threads,
        "minutes": plan.minutes,
        "seed": plan.seed,
        "created": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["python", "-m", "bench", *sys.argv[1:]]),
    } | compare(artifacts, model, contenders, plan, f"{truth.__module__}:{truth.__name__}")
    report = write_report(results, artifacts.folder)
    print("\n".join([*statements(results), "", table_text(results), "", f"report: {report}"]))
    return results


def main() -> None:
    """The command line. Exits with 1 if an engine disagrees with the reference."""
    results = run_bench(tyro.cli(BenchConfig, prog="python -m bench"))
    if any(row["agrees"] is False for row in results["rows"]):
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
