"""Commands that get a signal in the midst of their work, sent at a certain point of it and not after a time."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gpt import train as training
from gpt.checkpoint import Checkpoint
from gpt.files import hold_output
from gpt.train_config import TrainConfig

ROOT = Path(__file__).parents[2]
RUN = """tiny --corpus fox.txt --max-steps 12 --batch-size 4 --eval-interval 5 --eval-batches 1 --save-interval 0
    --warmup-steps 2 --hand-on last --dropout 0.2 --no-tensorboard --device cpu --threads 1 -o ckpt.pt --resume"""

# gpt.train, of which the rank that RANK names gets SIGNAL before its seventh update, once
SIGNALLED = """
import os, signal
from pathlib import Path
from gpt import train
from gpt.cli import run_command

plain = train.update

def update(run, late):
    if run.step == 6 and str(run.ranks.rank) == os.environ["RANK_HIT"] and not Path("hit").exists():
        Path("hit").touch()
        os.kill(os.getpid(), int(os.environ["SIGNAL"]))
    return plain(run, late)

train.update = update
run_command(train.main)
"""


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    (tmp_path / "fox.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    words = RUN.replace("fox.txt", str(tmp_path / "fox.txt")).replace("ckpt.pt", str(tmp_path / "ckpt.pt"))
    return training.parse(words.split())


@pytest.fixture
def signalled(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, signal.Signals], None]:
    """Have a signal come in the update that follows a number of them, once."""
    plain = training.update

    def arrange(step: int, number: signal.Signals) -> None:
        left = [number]

        def update(run, late: bool):
            if run.step == step and left:
                signal.raise_signal(left.pop())
            return plain(run, late)

        monkeypatch.setattr(training, "update", update)

    return arrange


def equal(one: Checkpoint, other: Checkpoint) -> bool:
    return (one.sha256, one.losses, one.step) == (other.sha256, other.losses, other.step)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("step", [0, 4, 6])  # the first update, one that is evaluated, another
def test_a_signal_saves_the_step_and_resuming_equals_a_run_without_one(config, signalled, number, step):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it
    whole = training.train(replace(config, output=config.output.with_name("whole.pt")))
    signalled(step, number)
    with pytest.raises(KeyboardInterrupt, match=rf"step {step + 1} is saved in .*ckpt-run; go on with --resume"):
        training.train(config)
    assert not config.output.exists()
    assert [path.name for path in config.folder.glob("step-*")] == [f"step-{step + 1:08d}.pt"]
    assert equal(training.train(config), whole)
    assert not list(config.output.parent.glob(".*"))


def test_a_signal_in_the_last_update_does_not_keep_the_run_from_its_end(config, signalled):
    whole = training.train(replace(config, output=config.output.with_name("whole.pt")))
    signalled(11, signal.SIGTERM)
    assert equal(training.train(config), whole)


@pytest.mark.slow
def test_a_second_training_into_one_output_ends_before_it_reads_its_corpus(config):
    """Nor does it touch the first one's folder, and another output is nobody's business."""
    config.folder.mkdir()
    (config.folder / "step-00000001.pt").write_text("the first one's")
    code = "import sys; from gpt import train; from gpt.cli import run_command; run_command(train.main)"
    words = RUN.replace("--resume", "--overwrite").replace("fox.txt", "absent.txt")
    for held in (config.output, config.folder):
        with hold_output(held):
            done = subprocess.run(
                [sys.executable, "-c", code, *words.split()],
                cwd=config.output.parent,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
            )
        assert (done.returncode, done.stdout) == (2, "")
        assert f"process {os.getpid()} on " in done.stderr
        assert done.stderr.startswith("error: cannot write ")
        assert done.stderr.count("\n") == 1
        assert (config.folder / "step-00000001.pt").read_text() == "the first one's"


@pytest.fixture
def torchrun(config, tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    def launch(rank: str = "none", number: int = 0) -> subprocess.CompletedProcess:
        (tmp_path / "script.py").write_text(SIGNALLED)
        command = "-m torch.distributed.run --standalone --nproc-per-node=2 script.py"
        return subprocess.run(
            [sys.executable, *command.split(), *RUN.split()],
            cwd=tmp_path,
            env=os.environ
            | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RANK_HIT": rank, "SIGNAL": str(int(number))},
            capture_output=True,
            text=True,
            timeout=280,
        )

    return launch


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("rank", ["1"])
def test_a_signal_to_one_rank_ends_all_when_their_step_is_saved(torchrun, config, tmp_path, rank):
    stopped = torchrun(rank, signal.SIGTERM)
    assert stopped.returncode != 0
    assert "ended by SIGTERM: step 8 is saved in ckpt-run; go on with --resume" in stopped.stderr
    assert [path.name for path in config.folder.glob("step-*")] == ["step-00000008.pt"]
    resumed = torchrun()
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "resumed: at step 8 of ckpt-run" in resumed.stdout
    assert config.output.exists()
    assert not list(tmp_path.glob(".*"))


# python -m bench of the seeded tiny model, whose parent gets a signal once its workers have loaded their engines
BENCH = """
import os, signal, sys
from pathlib import Path
import bench.__main__ as bench
from bench.harness.race import Race
from gpt.cli import run_command

plain = Race.load

def load(race):
    plain(race)
    Path("pids").write_text(" ".join(str(runner._worker.pid) for runner in race.runners))
    os.kill(os.getpid(), signal.SIGTERM)

Race.load = load
sys.argv = ["bench", "--seeded", "tiny", "--engine", "eager", "--engine", "sdpa", "--minutes", "0.01"]
run_command(bench.main)
"""


@pytest.mark.slow
def test_the_workers_of_a_comparison_end_with_it(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", BENCH],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 143, done.stderr
    assert done.stderr.splitlines()[-1].endswith("ended by SIGTERM: nothing half-written was left behind")
    assert "Traceback" not in done.stderr
    pids = (tmp_path / "pids").read_text().split()
    assert len(pids) == 2
    assert not [pid for pid in pids if Path("/proc", pid).exists()]
    folder = tmp_path / "artifacts" / "seeded-tiny"
    assert sorted(path.name for path in folder.iterdir()) == ["ckpt.pt"]
