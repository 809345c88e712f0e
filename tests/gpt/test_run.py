import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from gpt.checkpoint import load_training
from gpt.cli import UserError
from gpt.corpus import CorpusConfig, build_corpus, load_corpus
from gpt.distributed import Ranks
from gpt.run import Run
from gpt.train import train, update
from gpt.train_config import TrainConfig

MOMENTS = int(os.environ.get("KILL_MOMENTS", "30"))  # at which test_killed_at_random_moments… kills

KILLED_OVER_AND_OVER = """
import os, random, signal, sys, threading, time
from dataclasses import replace
from pathlib import Path
import torch
from tqdm import tqdm
from gpt.checkpoint import load_training
from gpt.train import train
from gpt.train_config import TrainConfig

tqdm.monitor_interval = 0
tqdm.set_lock(threading.RLock())  # its own is shared with children, and one of them would die holding it

def fork(work):
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    return pid

def check():  # every checkpoint is whole, and none was lost but that of the step on the way
    newest = max((load_training(path)[0].step for path in config.folder.glob("step-*.pt")), default=0)
    log = config.folder / "log.jsonl"
    logged = int(log.read_text().splitlines()[-1].split(": ")[1].split(",")[0]) if newest else 0
    assert logged - 1 <= newest, (newest, logged)

moments, seed = int(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
chance = random.Random(seed)
config = TrainConfig(
    corpus=Path("fox.txt"), output=Path("killed/ckpt.pt"), n_layer=1, n_head=2, n_embd=16, block_size=8, dropout=0.1,
    max_steps=10**6, decay_steps=100, batch_size=2, warmup_steps=5, eval_interval=3, eval_batches=1, save_interval=1,
    hand_on="last", tensorboard=False, threads=1, device="cpu", resume=True,
)
train(replace(config, max_steps=1, output=Path("warm/ckpt.pt")))  # all that is imported late is there for each child
for moment in range(moments):
    pid = fork(lambda: train(config))
    end = chance.uniform(0, 0.6)  # of its own CPU time: a start takes 0.2 s, a step with its checkpoint 0.01 s
    while time.clock_gettime(~pid << 3 | 2) < end:  # the clock that clock_getcpuclockid(3) gives
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert os.waitpid(fork(check), 0)[1] == 0
reached = int(sorted(config.folder.glob("step-*.pt"))[-1].stem.removeprefix("step-"))
train(replace(config, max_steps=reached + 2))
train(replace(config, max_steps=reached + 2, output=Path("whole/ckpt.pt")))
print(reached, Path("killed/ckpt.pt").read_bytes() == Path("whole/ckpt.pt").read_bytes())
"""


@pytest.fixture
def config(train_config, tmp_path) -> TrainConfig:
    """40 updates with all that is random in training."""
    return replace(
        train_config,
        output=tmp_path / "ckpt.pt",
        overwrite=False,
        dropout=0.2,
        max_steps=40,
        decay_steps=40,
        eval_interval=10,
        save_interval=10,
        hand_on="last",
    )


def states(config: TrainConfig, step: int) -> list[dict]:
    """The model and the training state that a run saved at that step, but for its settings."""
    checkpoint, training = load_training(config.folder / f"step-{step:08d}.pt")
    del training["config"]
    return [{**checkpoint.state, "losses": checkpoint.losses}, training]


def flat(tree: object) -> list:
    """The leaves of nested dicts and lists, in order."""
    if isinstance(tree, dict):
        return [leaf for key in tree for leaf in flat(tree[key])]
    if isinstance(tree, list):
        return [leaf for each in tree for leaf in flat(each)]
    return [tree]


def assert_same_bits(one: object, other: object) -> None:
    leaves = flat(one), flat(other)
    assert len(leaves[0]) == len(leaves[1]) > 10
    for a, b in zip(*leaves, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"order": "sequential", "micro_batch_size": 4}, {"precision": "bf16"}, {"recompute": True}]
)
def test_forty_steps_are_twenty_and_twenty_more(config, tmp_path, changes):
    config = replace(config, **changes)
    whole = replace(config, output=tmp_path / "whole.pt")
    train(whole)
    train(replace(config, max_steps=20))
    torch.manual_seed(0)  # what the process drew before is of no account
    train(replace(config, resume=True))
    assert_same_bits(states(config, 40), states(whole, 40))
    assert config.output.read_bytes() == whole.output.read_bytes()


@pytest.mark.slow
def test_the_scale_of_fp16_is_kept(config, tmp_path):
    config = replace(config, precision="fp16", max_steps=2, n_layer=1, n_embd=16, batch_size=2, block_size=8)
    train(replace(config, save_interval=1))
    scaler = load_training(config.folder / "step-00000001.pt")[1]["scaler"]
    run = Run(config, load_corpus(config.corpus), Ranks(0, 1, torch.device("cpu")))
    run.scaler.scale(torch.ones(1))
    run.scaler.update(3.0)
    run.restore(config.folder / "step-00000001.pt")
    assert run.scaler.state_dict() == scaler


def test_a_resumed_run_goes_on_with_log_and_losses(config, tmp_path):
    train(replace(config, max_steps=20))
    found = train(replace(config, resume=True))
    assert found.losses["step"] == [0, 10, 20, 30, 40]
    rows = [json.loads(line) for line in (config.folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 41))
    assert [row["step"] for row in rows if "val" in row] == [0, 10, 20, 30, 40]


def test_a_resumed_run_says_what_is_other_than_it_was(config, capsys):
    train(replace(config, max_steps=20))
    capsys.readouterr()
    train(replace(config, resume=True, learning_rate=1e-3))
    shown = capsys.readouterr().out
    assert f"resumed: at step 20 of {config.folder}; max_steps=40 (was 20); learning_rate=0.001 (was 0.01)\n" in shown


def test_resuming_a_finished_run_makes_no_step(config):
    train(config)
    before = config.output.read_bytes()
    config.output.unlink()
    assert train(replace(config, resume=True)).step == 40
    assert config.output.read_bytes() == before


def test_a_damaged_last_checkpoint_costs_its_steps_and_no_more(config, capsys, tmp_path, damage):
    whole = replace(config, output=tmp_path / "whole.pt", max_steps=20)
    train(whole)
    train(replace(config, max_steps=20))
    damage(config.folder / "step-00000020.pt")
    capsys.readouterr()
    train(replace(config, max_steps=20, resume=True))
    shown = capsys.readouterr().out
    assert f"resumed: at step 10 of {config.folder}; step-00000020.pt " in shown
    assert "; 10 steps are lost and made again\n" in shown
    assert config.output.read_bytes() == whole.output.read_bytes()


def test_what_was_damaged_is_said_also_where_the_rest_does_not_fit(config):
    train(replace(config, max_steps=20))
    path = config.folder / "step-00000020.pt"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"is of another model .*; step-00000020.pt .*renamed to .*; 10 steps are lost"):
        train(replace(config, resume=True, n_layer=1))


def test_without_its_best_model_a_run_goes_on_with_the_last(config, capsys):
    config = replace(config, hand_on="best", max_steps=20, order="one", batch_size=2)
    train(config)
    best = config.folder / "best.pt"
    best.write_bytes(best.read_bytes()[:100])
    found = train(replace(config, resume=True))
    assert "renamed to best.pt.damaged, and the model of step 20 takes its place" in capsys.readouterr().out
    assert found.step == 20
    assert load_training(config.folder / "step-00000020.pt")[0].losses == found.losses


def test_settings_of_the_optimizer_are_the_commands_and_not_the_checkpoints(config):
    train(replace(config, max_steps=1))
    run = Run(
        replace(config, beta2=0.5, weight_decay=0.7), load_corpus(config.corpus), Ranks(0, 1, torch.device("cpu"))
    )
    notes = run.restore(config.folder / "step-00000001.pt")
    assert {"beta2=0.5 (was 0.99)", "weight_decay=0.7 (was 0.1)"} < set(notes)
    assert [(group["betas"][1], group["weight_decay"]) for group in run.optimizer.param_groups] == [
        (0.5, 0.7),
        (0.5, 0),
    ]


@pytest.fixture
def folder_config(config, tmp_path) -> TrainConfig:
    """One update on token files."""
    build_corpus(CorpusConfig(str(config.corpus), tmp_path / "corpus", tokenizer="characters"))
    config = replace(config, corpus=tmp_path / "corpus", max_steps=1)
    train(config)
    return config


def test_a_corpus_that_was_left_alone_is_not_read_to_be_recognised(folder_config, monkeypatch):
    monkeypatch.setattr("gpt.corpus.sha256_file", None)
    assert train(replace(folder_config, max_steps=2, resume=True)).step == 2


@pytest.mark.parametrize("part", ["train", "val"])
def test_token_files_edited_in_place_are_noticed(folder_config, part, capsys):
    path = folder_config.corpus / f"{part}-00000.bin"
    times, content = path.stat(), path.read_bytes()
    path.write_bytes(content[:7] + bytes([content[7] ^ 1]) + content[8:])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    again = replace(folder_config, max_steps=2, resume=True)
    with pytest.raises(UserError, match=rf"{path} is not as it was written.*; bring that .* by --allow-changed-corpus"):
        train(again)
    path.write_bytes(content)
    assert train(again).step == 2
    path.write_bytes(content[:7] + bytes([content[7] ^ 1]) + content[8:])
    assert train(replace(again, max_steps=3, allow_changed_corpus=True)).step == 3
    assert f"; another corpus ({path} is not as it was written)" in capsys.readouterr().out
    assert train(replace(again, max_steps=4)).step == 4  # with what the run was last trained on


def test_a_copy_of_the_corpus_is_recognised(folder_config, tmp_path):
    shutil.copytree(folder_config.corpus, tmp_path / "copy")
    assert train(replace(folder_config, corpus=tmp_path / "copy", max_steps=2, resume=True)).step == 2


def test_a_text_edited_in_place_is_noticed(config, text_file, tmp_path):
    text = text_file.read_text()
    config = replace(config, corpus=tmp_path / "fox.txt", max_steps=1)
    config.corpus.write_text(text)
    train(config)
    config.corpus.write_text(text.replace("quick", "kciuq", 1))
    with pytest.raises(UserError, match=r"fox.txt: is not the corpus of .*step-00000001.pt \(its tokens of train are"):
        train(replace(config, resume=True))
    config.corpus.write_text(text)
    assert train(replace(config, resume=True)).step == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 10**9}, "a batch's token ids take 264,000,000,000 bytes, and this machine has 17,179,869,184;"),
        ({"batch_size": 5 * 10**6}, "a micro-batch's logits take 17,920,000,000 bytes"),
        ({"n_embd": 2**20}, r"the model and its training take [\d,]{15,} bytes"),
        ({"n_layer": 10**8}, r"the model and its training take [\d,]{15,} bytes"),
    ],
)
def test_what_no_memory_holds_is_refused_before_it_is_tried(config, monkeypatch, changes, words):
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 2**12, "SC_PHYS_PAGES": 2**22}.get)
    monkeypatch.setattr("gpt.run.build_model", None)
    with pytest.raises(UserError, match=f"not enough memory: {words}.*lower --batch-size"):
        train(replace(config, **changes))


def test_an_id_outside_the_vocabulary_is_one_line(folder_config):
    path = folder_config.corpus / "train-00000.bin"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(
        UserError, match=r"the corpus holds the token id 65535, but its vocabulary has 28: .* make it aga"
    ):
        train(replace(folder_config, overwrite=True))


def test_resuming_nothing_begins(config):
    assert train(replace(config, resume=True, max_steps=1)).step == 1


@pytest.mark.parametrize("changes", [{"n_layer": 1}, {"block_size": 8}, {"corpus": "other.txt"}])
def test_another_model_or_vocabulary_is_not_resumed(config, tmp_path, changes):
    train(replace(config, max_steps=1))
    (tmp_path / "other.txt").write_text("0123456789\n" * 100)
    if "corpus" in changes:
        changes = {"corpus": tmp_path / "other.txt"}
    with pytest.raises(UserError, match=r"step-00000001.pt: is of another model or corpus"):
        train(replace(config, resume=True, **changes))


@pytest.mark.slow
def test_compiled_training_is_the_same_within_rounding(config):
    config = replace(config, n_layer=1, dropout=0.0, max_steps=3, compile=True)
    corpus, alone = load_corpus(config.corpus), Ranks(0, 1, torch.device("cpu"))
    plain, compiled = (Run(replace(config, compile=compile_), corpus, alone) for compile_ in (False, True))
    for _ in range(3):
        assert update(plain)[0] == pytest.approx(update(compiled)[0], rel=1e-5)
    assert plain.checkpoint().state.keys() == compiled.checkpoint().state.keys()


@pytest.mark.long
def test_killed_at_random_moments_it_loses_no_step_but_the_last(text_file, tmp_path, environment):
    (tmp_path / "fox.txt").write_bytes(text_file.read_bytes())
    done = subprocess.run(
        [sys.executable, "-c", KILLED_OVER_AND_OVER, str(MOMENTS), "1"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    reached, same = done.stdout.splitlines()[-1].split()
    assert int(reached) > MOMENTS
    assert same == "True"
    assert not [path for path in (tmp_path / "killed" / "ckpt-run").iterdir() if path.name.startswith(".")]
