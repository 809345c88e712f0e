import json
from dataclasses import replace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpt.cli import UserError
from gpt.train import train
from gpt.training_log import TrainingLog


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(folder, steps, tensorboard=None, share=None):
    log = TrainingLog(folder / "log.jsonl", tensorboard, steps[0] - 1, 10, step_tokens=100, step_share=share)
    for step in steps:
        log.step(step, loss=1 / step, lr=1e-3, grad_norm=2.0, dt_s=0.5)
    log.evaluation(steps[-1], train=3.0, val=4.0)
    log.close()


def test_a_row_has_all_numbers_of_a_step(tmp_path):
    write(tmp_path, [1], share=0.1)
    step, evaluation = rows(tmp_path / "log.jsonl")
    assert step == {
        "step": 1,
        "loss": 1.0,
        "lr": 1e-3,
        "grad_norm": 2.0,
        "dt_s": 0.5,
        "tokens_per_s": 200.0,
        "mfu": 0.2,
    }
    assert evaluation == {"step": 1, "train": 3.0, "val": 4.0}


def test_without_a_peak_there_is_no_mfu(tmp_path):
    write(tmp_path, [1])
    assert rows(tmp_path / "log.jsonl")[0]["mfu"] is None


def test_rows_are_on_disk_at_once(tmp_path):
    log = TrainingLog(tmp_path / "log.jsonl", None, 0, 10, 100, None)
    log.step(1, 1.0, 1e-3, 2.0, 0.5)
    assert len(rows(tmp_path / "log.jsonl")) == 1
    log.close()


def test_what_a_killed_run_wrote_after_its_checkpoint_is_dropped(tmp_path):
    write(tmp_path, [1, 2, 3, 4])
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "los')
    write(tmp_path, [3, 4, 5])
    assert [row["step"] for row in rows(tmp_path / "log.jsonl") if "loss" in row] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("damaged", "where"),
    [
        (b"\0" * 4096, "line 5 of 5"),
        (b'{"step": 5, "los', "line 5 of 5"),
        (b'{"step": 5, "loss": 1}', "line 5 of 5"),  # without its end it may be cut
        (b"\0\0\n\xff\xfe\n", "2 lines from 5 on of 6"),
        (b'["step"]\n{"step": "5"}\n5\n', "3 lines from 5 on of 7"),
        (b"[" * 100_000 + b"\n", "line 5 of 5"),
    ],
)
def test_what_is_no_row_is_left_out_said_and_kept_beside(tmp_path, capsys, damaged, where):
    path = tmp_path / "log.jsonl"
    write(tmp_path, [1, 2, 3])
    before = rows(path)
    path.write_bytes(path.read_bytes() + damaged)
    whole = path.read_bytes()
    capsys.readouterr()
    write(tmp_path, [4, 5])
    assert (
        f"{path}: {where} left out, being no whole rows; as it was it is log.jsonl.damaged\n" in capsys.readouterr().out
    )
    assert rows(path)[:4] == before
    assert [row["step"] for row in rows(path) if "loss" in row] == [1, 2, 3, 4, 5]
    assert (tmp_path / "log.jsonl.damaged").read_bytes() == whole


def test_whole_rows_behind_a_damaged_one_stay(tmp_path):
    write(tmp_path, [1, 2, 3])
    lines = (tmp_path / "log.jsonl").read_bytes().splitlines(keepends=True)
    lines[1] = bytes(len(lines[1]) - 1) + b"\n"
    (tmp_path / "log.jsonl").write_bytes(b"".join(lines))
    write(tmp_path, [4])
    assert [row["step"] for row in rows(tmp_path / "log.jsonl") if "loss" in row] == [1, 3, 4]


@pytest.mark.parametrize("damaged", [bytes(100), b"\x18\0\0"])
def test_a_damaged_end_of_a_tensorboard_file_takes_no_other_row_with_it(tmp_path, damaged):
    write(tmp_path, [1, 2, 3], tensorboard=tmp_path / "board")
    (file,) = (tmp_path / "board").iterdir()
    file.write_bytes(file.read_bytes() + damaged)
    write(tmp_path, [4, 5], tensorboard=tmp_path / "board")
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [event.step for event in board.Scalars("loss")] == [1, 2, 3, 4, 5]


def test_an_error_finds_the_bar_ended(tmp_path, capfd):
    with pytest.raises(UserError), TrainingLog(tmp_path / "log.jsonl", None, 0, 10, 100, None):
        raise UserError("diverged")
    assert capfd.readouterr().err.endswith("\n")


def test_bar_and_print_show_the_run(tmp_path, capfd):
    write(tmp_path, [1, 2], share=0.1)
    shown = capfd.readouterr()
    assert "step     2: train loss 3.0000, val loss 4.0000" in shown.out
    assert "2/10" in shown.err
    assert "loss 0.500, 200 tok/s, mfu 20.0%" in shown.err


def test_tensorboard_has_the_same_numbers_also_of_a_resumed_run(tmp_path):
    write(tmp_path, [1, 2, 3, 4], tensorboard=tmp_path / "board")
    write(tmp_path, [3, 4, 5], tensorboard=tmp_path / "board")
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    assert set(board.Tags()["scalars"]) == {"loss", "lr", "grad_norm", "dt_s", "tokens_per_s", "train", "val"}
    losses = {event.step: event.value for event in board.Scalars("loss")}
    assert losses == pytest.approx({step: 1 / step for step in range(1, 6)})


def test_a_run_whose_log_needs_an_absent_package_ends_before_it_removes_anything(train_config, tmp_path, monkeypatch):
    config = replace(train_config, output=tmp_path / "ckpt.pt", tensorboard=True)
    (tmp_path / "ckpt-run").mkdir()
    (tmp_path / "ckpt-run" / "step-00000001.pt").touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tensorboard.* pip install tensorboard, or leave .* --no-tensorboard"):
        train(config)
    assert [path.name for path in config.folder.iterdir()] == ["step-00000001.pt"]
