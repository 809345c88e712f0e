import json
from dataclasses import replace

import pytest
import torch

from gpt.checkpoint import load_checkpoint, load_training, save_checkpoint, seeded_checkpoint
from gpt.cli import UserError
from gpt.run_folder import Resumption, RunFolder, plain
from gpt.train_config import TrainConfig


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path / "run", keep_last=2)


@pytest.fixture
def filled(folder, config) -> RunFolder:
    """Of a run that was killed after its update 30."""
    for step in (10, 20, 30):
        folder.save(replace(seeded_checkpoint(config), step=step), {"position": step})
    save_checkpoint(folder.best, seeded_checkpoint(config))
    folder.log.touch()
    folder.tensorboard.mkdir()
    (folder.path / ".step-00000040.pt.x1").mkdir()
    return folder


def test_the_last_few_stay(filled):
    assert [path.name for path in filled.steps()] == ["step-00000020.pt", "step-00000030.pt"]


def test_what_is_saved_can_be_resumed_or_used_as_a_model(filled, config):
    checkpoint, training = load_training(filled.steps()[-1])
    assert (checkpoint.step, training) == (30, {"position": 30})
    assert load_checkpoint(filled.steps()[-1]).build().config == config


def test_resuming_takes_the_newest(filled):
    assert filled.begin(resume=True, overwrite=False) == Resumption(filled.path / "step-00000030.pt")
    assert filled.log.exists()


def test_steps_are_in_the_order_of_their_numbers(folder, config):
    folder.keep_last = 4
    for step in (10**8, 99_999_999, 5):
        folder.save(replace(seeded_checkpoint(config), step=step), {})
    (folder.path / "step-of-mine.pt").touch()
    assert [path.stem for path in folder.steps()] == ["step-00000005", "step-99999999", "step-100000000"]


def test_a_damaged_checkpoint_is_renamed_and_the_one_before_it_taken(filled, damage):
    older, newest = filled.steps()
    content = damage(newest)
    found = filled.begin(resume=True, overwrite=False)
    assert (found.path, found.best_is_lost) == (older, False)
    assert found.notes[0].startswith("step-00000030.pt ")
    assert found.notes[0].endswith(": renamed to step-00000030.pt.damaged")
    assert found.notes[1:] == ("10 steps are lost and made again",)
    assert filled.steps() == [older]
    assert newest.with_name("step-00000030.pt.damaged").read_bytes() == content


@pytest.mark.parametrize("where", ["state", "training"])
def test_a_checkpoint_with_nan_is_passed_over(filled, where):
    older, newest = filled.steps()
    content = torch.load(newest)
    name = "transformer.ln_f.weight" if where == "state" else "optimizer.0.exp_avg"
    content["training"]["optimizer"] = [{"exp_avg": torch.tensor([0.0, torch.inf if where == "training" else 1])}]
    if where == "state":
        content["state"][name][3] = torch.nan
    torch.save(content, newest)
    found = filled.begin(resume=True, overwrite=False)
    assert found.path == older
    assert found.notes[0].startswith(f"step-00000030.pt {name} holds NaN or infinity: training diverged: renamed to")


def test_where_none_is_whole_all_keep_their_names(filled, damage):
    older, newest = filled.steps()
    for path in (older, newest):
        damage(path)
    with pytest.raises(UserError, match=r"whole: step-00000030.pt \(.*\), step-00000020.pt \(.*\); begin again with"):
        filled.begin(resume=True, overwrite=False)
    assert filled.steps() == [older, newest]


def test_a_whole_checkpoint_of_another_kind_is_an_error_and_no_damage(filled):
    newest = filled.steps()[-1]
    torch.save(torch.load(newest) | {"version": 2}, newest)
    with pytest.raises(UserError, match=r"step-00000030.pt: has version 2 of the checkpoint format"):
        filled.begin(resume=True, overwrite=False)
    assert filled.steps()[-1] == newest


def test_a_second_damaged_file_does_not_replace_the_first(filled, config):
    for content in (b"one", b"two"):
        filled.save(replace(seeded_checkpoint(config), step=40), {})
        filled.steps()[-1].write_bytes(content)
        filled.begin(resume=True, overwrite=False)
    kept = {path.name: path.read_bytes() for path in filled.path.glob("*.damaged*")}
    assert kept == {"step-00000040.pt.damaged": b"one", "step-00000040.pt.damaged-2": b"two"}
    filled.begin(resume=False, overwrite=True)
    assert list(filled.path.iterdir()) == []


def test_a_damaged_or_absent_best_model_is_noticed(filled, damage):
    damage(filled.best)
    found = filled.begin(resume=True, overwrite=False)
    assert found.best_is_lost
    assert found.notes[0].startswith("best.pt ")
    assert found.notes[0].endswith("renamed to best.pt.damaged, and the model of step 30 takes its place")
    assert filled.begin(resume=True, overwrite=False) == Resumption(found.path, (), best_is_lost=True)


def test_what_a_killed_run_was_writing_is_removed(filled):
    filled.begin(resume=True, overwrite=False)
    assert not [path for path in filled.path.iterdir() if path.name.startswith(".")]


def test_an_unfinished_run_is_not_removed_unasked(filled):
    with pytest.raises(UserError, match=r"holds an unfinished run; go on with --resume, or begin again with --overw"):
        filled.begin(resume=False, overwrite=False)
    assert len(filled.steps()) == 2


@pytest.mark.parametrize("finished", [False, True])
def test_an_overwritten_or_finished_run_makes_way(filled, finished):
    if finished:
        filled.finished.touch()
    assert filled.begin(resume=False, overwrite=not finished) is None
    assert list(filled.path.iterdir()) == []


def test_a_folder_that_is_not_there_yet_begins(folder):
    assert folder.begin(resume=True, overwrite=False) is None
    assert folder.begin(resume=False, overwrite=False) is None


def test_the_config_is_kept_for_people(folder):
    folder.write_config(TrainConfig())
    assert json.loads((folder.path / "config.json").read_text()) == plain(TrainConfig())
