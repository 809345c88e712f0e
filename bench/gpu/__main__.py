"""python -m bench.gpu                                      # all, on the GPU that is here → docs/gpu
python -m bench.gpu --models gpt2 --phases decode --minutes 4
python -m bench.gpu --engine tvm --engine inductor --no-kernels
python -m bench.gpu --device cpu --models tiny --minutes 3   # try the command where no GPU is

Measure a GPU and every engine on it: its limits, each kernel and each engine against float64, then the first token and
decode of GPT-2's sizes in bfloat16. A JSON file a model and a table of all of them are written as they grow, so what
was done is there if the run is stopped.
"""

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is one line too
    from gpt.cli import run_main

    run_main("bench.gpu.__main__")

import datetime
import json
import os
import shlex
import sys
import time
import traceback
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import tyro

from bench.backends import Candidate, refuse_absent
from bench.gpu.device import DeviceArtifacts, target_of
from bench.gpu.engines import BASELINE, find_candidates
from bench.gpu.kernels import check_kernels
from bench.gpu.phases import DEVICE_PHASES, FirstToken
from bench.gpu.race import run_race
from bench.gpu.table import KERNELS, write_table
from bench.harness.machine import checked_threads
from bench.harness.memory import give_memory_back
from bench.harness.plan import ROUNDS, Plan
from bench.harness.worker import MOST_CHARACTERS
from bench.models.artifacts import CHECKPOINT
from bench.models.build import SEEDED, prepare
from gpt.arguments import parse_settings
from gpt.cli import UserError
from gpt.costs import matmul_parameters
from gpt.files import atomic_output, hold_output

MODELS = ("gpt2", "gpt2-medium", "gpt2-large")
KERNELS_SHARE = 0.3  # of all time, at most


@dataclass(frozen=True)
class GpuConfig:
    """Measure a GPU and every engine on it."""

    models: tuple[str, ...] = MODELS  # shapes of bench.models.build, with random weights
    phases: tuple[str, ...] = tuple(DEVICE_PHASES)  # first-token, decode, generate
    engine: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # only this engine; may be given again
    minutes: float = 8.0  # minutes for all of it: what is not begun by then is left out, and named
    seconds: float = 1.0  # seconds of timing per row
    kernels: bool = True  # compare each kernel with float64 first
    device: str = "cuda"  # cuda, or cpu to try the command where no GPU is
    output: Path = Path("docs/gpu")  # the folder to write
    artifacts: Path = Path("artifacts")  # where the models are made
    threads: int | None = None  # threads of the host; by default the physical cores that this process may use
    seed: int = field(default_factory=lambda: int.from_bytes(os.urandom(4)))  # seed of the random ids

    def check(self) -> None:
        """Raise UserError for a value that makes no sense."""
        for name, known in (("models", SEEDED), ("phases", DEVICE_PHASES)):
            if unknown := [each for each in getattr(self, name) if each not in known]:
                raise UserError(f"{name} {unknown[0]!r}: must be of {', '.join(known)}")
        if "bigram" in self.models:
            raise UserError("models 'bigram': it has no cache and no attention; take another")
        for name in ("minutes", "seconds"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}={getattr(self, name)}: must be more than 0")


def run_gpu(config: GpuConfig) -> bool:
    """Measure, and write the files as results come. Returns True if all that was compared agrees.

    Raises UserError for a setting that makes no sense, without the device, and for an engine asked for that is absent.
    """
    config.check()
    until = time.monotonic() + 60 * config.minutes
    target, threads = target_of(config.device), checked_threads(config.threads)
    candidates = find_candidates(config.engine, target)
    right = _check_kernels(config, until) if config.kernels else True
    for number, model in enumerate(config.models):
        now = time.monotonic()
        share = now + (until - now) / (len(config.models) - number)
        artifacts = DeviceArtifacts(config.artifacts / f"seeded-{model}", config.device, target)
        shape = SEEDED[model]
        in_turn = zip_longest(*(DEVICE_PHASES[phase].timed(shape) for phase in config.phases))
        works = tuple(work for each in in_turn for work in each if work)  # each phase has some if time runs out
        prompts = [(work.B, work.T) for work in works if isinstance(work, FirstToken)]
        able = those_that_can(candidates, artifacts, prompts)
        refuse_absent(config.engine, able)
        plan = Plan(shape, works, threads, seed=config.seed, precision="bf16", baseline=BASELINE)
        about = {
            "model": model,
            "parameters": matmul_parameters(shape),
            "config": asdict(shape),
            "rounds": ROUNDS,
            "seed": config.seed,
            "created": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "command": shlex.join(["python", "-m", "bench.gpu", *sys.argv[1:]]),
        }
        keep = partial(_keep, config.output, f"{model}.json", about)
        print(f"{model}, {len(able)} engines on {config.device}", file=sys.stderr, flush=True)
        found = run_race(artifacts, able, plan, row_s=config.seconds, until=share, keep=keep)
        right = right and not any(each["agrees"] is False for each in (*found["rows"], *found["checks"]))
    print(f"wrote {write_table(config.output)}")
    return right


def those_that_can(
    candidates: Iterable[Candidate], artifacts: DeviceArtifacts, prompts: Collection[tuple[int, int]]
) -> list[Candidate]:
    """Make the files that the candidates need, and return the candidates, absent with a reason if that failed.

    prompts: the shapes (B, T) that static engines need files for.
    """
    found, made = [], {CHECKPOINT}  # not verified twice, as reading the checkpoint of a large model takes seconds
    prepare(artifacts, [])
    for each in candidates:
        files = {file for _, file in each.files}
        if not each.absent and not files <= made:
            try:
                prepare(artifacts, [each], DEVICE_PHASES, prompts)
            except UserError as error:
                each = replace(each, absent=str(error))
            except Exception as error:  # an exporter or compiler failed, and the other engines can still be timed
                traceback.print_exc()
                words = " ".join(f"{type(error).__name__}: {error}".split())
                each = replace(each, absent=f"its files could not be made: {words[:MOST_CHARACTERS]}")
            else:
                made |= files
            give_memory_back()
        found.append(each)
    return found


def _check_kernels(config: GpuConfig, until: float) -> bool:
    """Check each kernel, and write the results. Returns True if all cases ran and agree."""
    print(f"each kernel against float64 on {config.device}", file=sys.stderr, flush=True)
    found = check_kernels(config.device, KERNELS_SHARE * (until - time.monotonic()))
    found["where"] = "on the GPU" if config.device == "cuda" else "in the model of a GPU's threads, without a GPU"
    _keep(config.output, KERNELS, {}, found)
    return not found["reason"] and all(case["status"] == "agrees" for case in found["cases"])


def _keep(folder: Path, name: str, about: dict[str, Any], found: dict[str, Any]) -> None:
    """Write results to a file, and the table of all files in the folder."""
    with atomic_output(folder / name) as part:
        part.write_text(json.dumps(about | found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    write_table(folder)


def main() -> None:
    """The command line. Exits with 1 if something disagrees with float64."""
    config = parse_settings(GpuConfig, prog="python -m bench.gpu")
    with hold_output(config.output):
        right = run_gpu(config)
    if not right:
        sys.exit(1)
