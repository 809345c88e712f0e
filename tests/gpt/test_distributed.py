"""Ranks started by torchrun, which talk by Gloo. --standalone finds a free port, so that runs do not meet."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpt.checkpoint import load_checkpoint
from gpt.distributed import Ranks, is_first_process, join_ranks
from gpt.train import parse, train

pytestmark = pytest.mark.timeout(300)

SETTINGS = """tiny --corpus fox.txt --batch-size 8 --eval-interval 10 --eval-batches 1 --save-interval 10
    --warmup-steps 2 --learning-rate 1e-2 --min-lr 1e-3 --hand-on last --no-tensorboard --device cpu --threads 1"""

# gpt.train, whose ranks count what they exchange for gradients
COUNTED = """
from pathlib import Path
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from gpt import train
from gpt.run import Run

class Counting(Run):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.exchanges = 0
        def hook(state, bucket):
            self.exchanges += 1
            return allreduce_hook(None, bucket)
        self.model.register_comm_hook(None, hook)

    def training(self):
        Path(f"exchanges-{self.ranks.rank}").write_text(f"{self.exchanges} {self.step} {self.batches.micro_steps}")
        return super().training()

train.Run = Counting
train.main()
"""

# gpt.train, whose rank 1 is killed before its update 26, once
KILLED = """
import os, signal
from pathlib import Path
from gpt import train

plain = train.update

def update(run, late):
    if run.step == 25 and run.ranks.rank == 1 and not Path("killed").exists():
        Path("killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(run, late)

train.update = update
train.main()
"""


@pytest.fixture
def torchrun(tmp_path: Path, text_file: Path, environment: dict) -> Callable[..., subprocess.CompletedProcess]:
    """Run gpt.train, or a script, by torchrun in a folder that has a text."""
    (tmp_path / "fox.txt").write_bytes(text_file.read_bytes())

    def launch(ranks: int, arguments: str, script: str | None = None, restarts: int = 0):
        (tmp_path / "script.py").write_text(script or "from gpt import train\ntrain.main()\n")
        launcher = f"-m torch.distributed.run --standalone --nproc-per-node={ranks} --max-restarts={restarts} script.py"
        with subprocess.Popen(
            [sys.executable, *launcher.split(), *SETTINGS.split(), *arguments.split()],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                stdout, stderr = process.communicate(timeout=150)
            except subprocess.TimeoutExpired:
                process.terminate()  # torchrun then ends its ranks, which a kill would leave behind
                stdout, stderr = process.communicate(timeout=150)
                pytest.fail(f"torchrun did not end:\n{stderr[-3000:]}")
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    return launch


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_the_same_batches_give_the_same_parameters_on_any_number_of_ranks(torchrun, tmp_path, monkeypatch, world):
    done = torchrun(world, "--max-steps 10 --micro-batch-size 1 -o many.pt", COUNTED)
    assert done.returncode == 0, done.stderr[-3000:]
    monkeypatch.chdir(tmp_path)
    one = train(parse([*SETTINGS.split(), "--max-steps", "10", "-o", "one.pt"]))
    many = load_checkpoint("many.pt")
    for name, tensor in one.state.items():
        # sums of 8 gradients in another order: float32's rounding, times ten updates of at most 1e-2
        assert torch.allclose(tensor, many.state[name], rtol=0, atol=2e-6), name
    assert many.losses["val"] == pytest.approx(one.losses["val"], rel=1e-5)
    for rank in range(world):  # gradients went between the ranks once an update, whatever the micro-batches
        exchanges, steps, micro_steps = map(int, (tmp_path / f"exchanges-{rank}").read_text().split())
        assert (exchanges, steps, micro_steps) == (10, 10, 8 // world)
    assert done.stdout.count("step    10: train loss") == done.stdout.count("sample:") == 1
    assert f"{world} ranks" in done.stdout


@pytest.mark.slow
def test_a_killed_rank_under_max_restarts_goes_on_to_the_same_bits(torchrun, tmp_path):
    settings = "--max-steps 40 --dropout 0.2 --resume"
    whole = torchrun(2, f"{settings} -o whole.pt")
    killed = torchrun(2, f"{settings} -o ckpt.pt", KILLED, restarts=3)
    assert (whole.returncode, killed.returncode) == (0, 0), whole.stderr[-3000:] + killed.stderr[-3000:]
    assert (tmp_path / "killed").exists()
    assert re.search(r"^resumed: at step 20 of ckpt-run$", killed.stdout, re.MULTILINE)
    assert (tmp_path / "ckpt.pt").read_bytes() == (tmp_path / "whole.pt").read_bytes()


@pytest.mark.slow
def test_a_killed_rank_ends_all(torchrun, tmp_path):
    done = torchrun(2, "--max-steps 1000000", KILLED)
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr
    assert not (tmp_path / "artifacts" / "ckpt.pt").exists()
    assert [path.name for path in (tmp_path / "artifacts" / "ckpt-run").glob("step-*")] == [
        "step-00000010.pt",
        "step-00000020.pt",
    ]


def test_a_lone_process_is_the_first_of_one():
    with join_ranks("cpu") as ranks:
        assert (ranks.rank, ranks.world, ranks.leads, ranks.device.type) == (0, 1, True, "cpu")
    assert is_first_process()


def test_a_lone_rank_agrees_with_itself():
    ranks = Ranks(0, 1, torch.device("cpu"))
    assert ranks.mean(torch.tensor([1.0, 3.0])).tolist() == [1.0, 3.0]
    assert ranks.gather("x") == ["x"]
    assert ranks.follow("x") == "x"
