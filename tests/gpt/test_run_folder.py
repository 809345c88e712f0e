import json
from dataclasses import replace

import pytest

from gpt.checkpoint import load_checkpoint, load_training, seeded_checkpoint
from gpt.cli import UserError
from gpt.run_folder import RunFolder, plain
from gpt.train_config import TrainConfig


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path / "run", keep_last=2)


@pytest.fixture
def filled(folder, config) -> RunFolder:
    """Of a run that was killed after its update 30."""
    for step in (10, 20, 30):
        folder.save(replace(seeded_checkpoint(config), step=step), {"position": step})
    for path in (folder.best, folder.log):
        path.touch()
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
    assert filled.begin(resume=True, overwrite=False).name == "step-00000030.pt"
    assert filled.log.exists()


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
