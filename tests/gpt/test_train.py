import json
import math
import signal
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from gpt.checkpoint import load_checkpoint, load_training, save_checkpoint
from gpt.cli import UserError, run_command
from gpt.corpus import CorpusConfig, build_corpus, load_corpus
from gpt.distributed import Ranks
from gpt.model import loss_of
from gpt.presets import PRESETS
from gpt.run import Run, batches_of
from gpt.train import estimate_loss, main, parse, sample, train, update

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def new_run(train_config) -> Callable[..., Run]:
    """A run at its first step, with some settings changed."""

    def begin(**changes: object) -> Run:
        config = replace(train_config, **changes)
        return Run(config, load_corpus(config.corpus), ALONE)

    return begin


def test_learns(trained):
    losses = trained.losses
    assert losses["step"] == [0, 30, 60]
    assert trained.step == 60
    assert losses["val"][0] == pytest.approx(math.log(28), rel=0.05)
    assert losses["val"][-1] < 0.6 * losses["val"][0]


def test_the_same_seed_trains_the_same(tmp_path, train_config, trained):
    again = train(train_config)
    assert save_checkpoint(tmp_path / "a.pt", trained) == save_checkpoint(tmp_path / "b.pt", again)


def test_another_seed_trains_another(train_config, trained):
    other = train(replace(train_config, seed=1))
    assert other.losses["val"] != trained.losses["val"]


def test_losses_are_those_of_the_returned_weights_without_dropout(train_config, capsys):
    config = replace(train_config, dropout=0.3, max_steps=5)
    checkpoint = train(config)
    batches, model = batches_of(config, load_corpus(config.corpus), ALONE, "val"), checkpoint.build("sdpa")
    losses = [
        loss_of(model(inputs), targets).item() for _ in range(config.eval_batches) for inputs, targets in batches.draw()
    ]
    assert checkpoint.losses["val"][-1] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert f"val loss {checkpoint.losses['val'][-1]:.4f}" in capsys.readouterr().out


def test_stops_at_its_minutes(train_config):
    stopped = train(replace(train_config, max_steps=10**9, minutes=0.5 / 60))
    assert 0 < stopped.step < 10**6
    assert stopped.losses["step"][-1] == stopped.step


def test_a_diverged_run_is_a_users_error(train_config):
    with pytest.raises(UserError, match="training diverged; lower --learning-rate"):
        train(replace(train_config, learning_rate=1e30, grad_clip=0.0))


def test_a_run_that_diverges_ends_at_once_and_names_the_last_good_checkpoint(train_config, tmp_path):
    config = replace(train_config, output=tmp_path / "ckpt.pt", max_steps=30, eval_interval=30)
    train(config)
    worse = replace(config, resume=True, overwrite=False, max_steps=10**6, eval_interval=10**6, save_interval=1)
    with pytest.raises(UserError, match=r"training diverged; .*step-000000(3\d)\.pt is the last good") as caught:
        train(replace(worse, learning_rate=1e30, grad_clip=0.0))
    kept = sorted(config.folder.glob("step-*.pt"))[-1]
    assert str(kept) in str(caught.value)
    load_checkpoint(kept)  # which refuses NaN


def test_no_file_that_is_read_is_written_on(train_config, text_file, monkeypatch):
    content = text_file.read_bytes()
    monkeypatch.setattr(sys, "argv", ["gpt.train", "tiny", "--corpus", str(text_file), "-o", str(text_file)])
    with pytest.raises(UserError, match="is read from there; choose another place with -o"):
        main()
    assert text_file.read_bytes() == content


def test_sample_is_text_of_the_vocabulary(trained):
    text = sample(trained, tokens=30, seed=1)
    assert len(text) == 30
    assert set(text) <= set(trained.tokenizer["characters"])


def test_patience_stops_a_run_that_no_longer_learns(train_config):
    stopped = train(replace(train_config, learning_rate=0.0, min_lr=0.0, max_steps=10**6, eval_interval=5, patience=3))
    assert stopped.losses["step"] == [0]  # the weights handed on are the first of the equally good
    rows = (train_config.folder / "log.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["step"] == 15


@pytest.mark.parametrize("hand_on", ["best", "last"])
def test_the_best_or_the_last_weights_are_handed_on(train_config, hand_on):
    config = replace(train_config, hand_on=hand_on, max_steps=100, eval_interval=10, batch_size=2, min_lr=1e-2)
    found = train(replace(config, order="one"))  # learns one batch by heart, and gets worse on all else
    val = load_training(config.folder / "step-00000100.pt")[0].losses["val"]
    assert min(val) < val[-1]
    assert found.losses["val"][-1] == (min(val) if hand_on == "best" else val[-1])
    assert load_checkpoint(config.output).step == found.step


def test_micro_batches_add_up_to_the_batch(train_config):
    one, many = (
        train(replace(train_config, micro_batch_size=size, max_steps=10, hand_on="last")) for size in (None, 3)
    )
    for name, tensor in one.state.items():
        assert torch.allclose(tensor, many.state[name], atol=1e-6), name


@pytest.mark.parametrize(("learning_rate", "grad_clip"), [(2.0, 1e-3), (0.5, 1e-2)])
def test_an_update_is_as_long_as_rate_and_clip_allow(new_run, learning_rate, grad_clip):
    run = new_run(learning_rate=learning_rate, grad_clip=grad_clip, warmup_steps=0)
    run.optimizer = torch.optim.SGD(run.raw.parameters())
    before = parameters_to_vector(run.raw.parameters()).detach()
    _, grad_norm, _ = update(run)
    moved = (parameters_to_vector(run.raw.parameters()).detach() - before).norm().item()
    assert grad_norm > 10 * grad_clip  # before it is clipped
    assert moved == pytest.approx(learning_rate * grad_clip, rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_learns_as_well(train_config, precision):
    config = replace(train_config, max_steps=10, eval_interval=10)
    full, lower = train(config), train(replace(config, precision=precision))
    assert {tensor.dtype for tensor in lower.state.values()} == {torch.float32}
    assert lower.losses["val"][-1] == pytest.approx(full.losses["val"][-1], rel=0.05)
    assert lower.losses["val"] != full.losses["val"]


def test_fp16_scales_its_loss_and_skips_an_overflow(new_run):
    run = new_run(precision="fp16")
    scale = run.scaler.get_scale()
    before = run.raw.state_dict()["transformer.wte.weight"].clone()
    with torch.no_grad():
        run.raw.transformer.ln_f.weight.mul_(1e5)  # beyond what fp16 can hold
    update(run)
    assert torch.equal(run.raw.state_dict()["transformer.wte.weight"], before)
    assert 0 < run.scaler.get_scale() < scale


def test_recomputing_activations_changes_nothing(train_config):
    config = replace(train_config, dropout=0.2, max_steps=5, hand_on="last")
    plain, recomputed = (train(replace(config, recompute=recompute)) for recompute in (False, True))
    assert all(torch.equal(tensor, recomputed.state[name]) for name, tensor in plain.state.items())


def test_estimates_are_the_same_each_time_and_leave_training_alone(new_run):
    run, undisturbed = new_run(dropout=0.2), new_run(dropout=0.2)
    torch.manual_seed(1)
    assert estimate_loss(run) == estimate_loss(run)
    loss, *_ = update(run)
    torch.manual_seed(1)
    assert update(undisturbed)[0] == loss


def test_a_folder_of_tokens_trains_as_its_text_does(train_config, trained, tmp_path):
    build_corpus(CorpusConfig(str(train_config.corpus), tmp_path / "corpus", tokenizer="characters"))
    again = train(replace(train_config, corpus=tmp_path / "corpus"))
    assert again.tokenizer == trained.tokenizer
    assert all(torch.equal(tensor, again.state[name]) for name, tensor in trained.state.items())


def test_weights_to_begin_with_may_be_a_checkpoints(train_config, trained, tmp_path):
    save_checkpoint(tmp_path / "begin.pt", trained)
    config = replace(train_config, init_from=str(tmp_path / "begin.pt"), max_steps=1, learning_rate=0.0, min_lr=0.0)
    assert train(config).losses["val"][0] == trained.losses["val"][-1]


def test_weights_to_begin_with_are_cropped_to_the_block_size(train_config, trained, tmp_path):
    save_checkpoint(tmp_path / "begin.pt", trained)
    config = replace(train_config, init_from=str(tmp_path / "begin.pt"), max_steps=1, block_size=8, n_layer=4)
    found = train(config)
    assert (found.config.block_size, found.config.n_layer) == (8, 2)


def test_weights_of_a_padded_vocabulary_can_be_begun_with(train_config, trained, tmp_path):
    """As nanoGPT pads GPT-2's 50,257 tokens to 50,304: the corpus has the same tokenizer, which has fewer ids."""
    table = torch.nn.functional.pad(trained.state["transformer.wte.weight"], (0, 0, 0, 4))
    state = trained.state | {"transformer.wte.weight": table, "lm_head.weight": table}
    shape = replace(trained.config, vocab_size=trained.config.vocab_size + 4)
    save_checkpoint(tmp_path / "begin.pt", replace(trained, config=shape, state=state))
    config = replace(train_config, init_from=str(tmp_path / "begin.pt"), max_steps=1)
    assert train(config).config == shape


def test_weights_of_another_vocabulary_are_refused(train_config, trained, tmp_path):
    save_checkpoint(tmp_path / "begin.pt", trained)
    (tmp_path / "other.txt").write_text("0123456789\n" * 100)
    config = replace(train_config, init_from=str(tmp_path / "begin.pt"), corpus=tmp_path / "other.txt")
    with pytest.raises(UserError, match=r"--init-from .*begin.pt: has another vocabulary than"):
        train(config)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_an_absent_gpu_is_a_users_error(train_config):
    with pytest.raises(UserError, match="--device cuda: torch sees none here"):
        train(replace(train_config, device="cuda"))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_takes_overrides(preset):
    expected = replace(PRESETS[preset][1], n_head=1, max_steps=7, bias=True)
    assert parse([preset, "--max-steps", "7", "--n-head", "1", "--bias"]) == expected


def test_overrides_without_a_preset_are_the_demos():
    assert parse(["--max-steps", "7"]) == replace(PRESETS["demo"][1], max_steps=7)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-steps", "-1"], "max_steps=-1: must be at least 1 and at most 2147483647"),
        (["--seed", str(2**70)], f"seed={2**70}: must be at least 0 and at most {2**62 - 1}"),
        (["--learning-rate", "nan"], "learning_rate=nan: must be at least 0"),
        (["--learning-rate", "inf"], "learning_rate=inf: must be at least 0"),
        (["--threads", "100000"], "threads=100000: must be in 1 … "),
        (["--n-head", "3"], "n_embd=128: must be a multiple of n_head=3"),
    ],
)
@pytest.mark.parametrize("preset", [["demo"], []])
def test_a_value_out_of_range_is_one_line(flags, words, preset, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpt.train", *preset, *flags])
    with pytest.raises(SystemExit) as exit_:
        run_command(main)
    assert exit_.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"error: {words}")
    assert shown.err.count("\n") == 1


def test_vocabulary_is_no_flag(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(["tiny", "--vocab-size", "3"])
    assert exit_.value.code == 2
    assert "--vocab-size" in capsys.readouterr().err


def test_an_unknown_preset_is_refused_with_those_that_exist(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(["huge"])
    assert exit_.value.code == 2
    shown = capsys.readouterr().err
    assert "huge" in shown
    assert all(preset in shown for preset in PRESETS)


@pytest.mark.slow
def test_command_trains_and_says_where_the_checkpoint_is(run, tmp_path):
    done = run("gpt.train", "tiny", "--max-steps", 20, "-o", "out/ckpt.pt", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("config: corpus=None")
    assert any("standard library" in line for line in lines)
    assert any(line.startswith("step     0: train loss") for line in lines)
    assert "sample:" in lines
    assert lines[-1] == "checkpoint: out/ckpt.pt"
    assert "20/20" in done.stderr
    assert load_checkpoint(tmp_path / "out" / "ckpt.pt").step == 20


@pytest.mark.slow
def test_interrupted_command_keeps_the_old_checkpoint_and_nothing_half_written(start, tmp_path, trained):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored, and that is inherited
    sha256 = save_checkpoint(tmp_path / "ckpt.pt", trained)
    with start("gpt.train", "tiny", "--max-steps", 10**6, "--minutes", 1, "-o", "ckpt.pt") as process:
        while "step     0" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        stderr = process.communicate(timeout=300)[1]
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert {path.name for path in tmp_path.iterdir()} == {"ckpt.pt", "ckpt-run"}
    assert not [path for path in (tmp_path / "ckpt-run").iterdir() if path.name.startswith(".")]
    assert load_checkpoint(tmp_path / "ckpt.pt").sha256 == sha256


@pytest.mark.slow
def test_an_unwritable_output_is_found_before_training(run):
    done = run("gpt.train", "tiny", "--max-steps", 10**9, "-o", "/dev/null/ckpt.pt")
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot write /dev/null/ckpt.pt")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.parametrize(("dropout", "backend"), [(0.0, "flash"), (0.1, "math")])
def test_says_which_attention_kernel_runs(train_config, capsys, dropout, backend):
    train(replace(train_config, max_steps=1, dropout=dropout))  # torch's flash on a CPU has no dropout
    assert f"in fp32, attention by {backend}\n" in capsys.readouterr().out
