"""python -m gpt.train
python -m gpt.train char-cpu --corpus input.txt --max-steps 500 --n-layer 2
python -m gpt.train char --corpus input.txt --minutes 30 -o artifacts/char.pt --resume
torchrun --standalone --nproc-per-node 2 -m gpt.train gpt2-124m --corpus artifacts/fineweb-edu --resume

Train a GPT and write a checkpoint: one process, or as many as torchrun starts.
"""

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is one line too
    from gpt.cli import run_main

    run_main("gpt.train")

import math
import textwrap
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import tyro
from torch.nn.parallel import DistributedDataParallel

from gpt.arguments import parse_settings
from gpt.attention import sdpa_backend
from gpt.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from gpt.cli import UserError, check_threads, defer_interrupt
from gpt.corpus import load_corpus
from gpt.costs import training_flops_per_token
from gpt.device import explain_memory
from gpt.distributed import Ranks, is_first_process, join_ranks
from gpt.files import check_output, hold_output
from gpt.generate import generate
from gpt.model import loss_of
from gpt.optimizer import allow_tf32, autocast, learning_rate_at
from gpt.peak import DTYPES, peak_flops
from gpt.presets import PRESETS
from gpt.run import LESS_MEMORY, Run, batches_of
from gpt.run_folder import Resumption, RunFolder, plain
from gpt.tokenizer import CharTokenizer, GPT2Tokenizer, tokenizer_from_json
from gpt.train_config import TrainConfig
from gpt.training_log import TrainingLog, check_tensorboard


def train(config: TrainConfig) -> Checkpoint:
    """Train a model, write it to config.output and return it; config.folder has checkpoints and logs of the way there.

    Under torchrun every rank calls it, and rank 0 prints and writes. Raises UserError for a corpus that cannot be used,
    a device that is not there, settings that do not fit, a log without its package, or a loss that is no longer a
    number.
    """
    if config.tensorboard:
        check_tensorboard()  # on every rank, and before an earlier run's files are removed
    check_threads(config.threads)
    with ExitStack() as held:
        if is_first_process():
            held.enter_context(hold_output(config.output))
            held.enter_context(hold_output(config.folder))
        with join_ranks(config.device) as ranks, explain_memory(LESS_MEMORY):
            return _train(config, ranks)


def _train(config: TrainConfig, ranks: Ranks) -> Checkpoint:
    if config.threads:
        torch.set_num_threads(config.threads)
    run = Run(config, load_corpus(config.corpus, config.tokenizer), ranks)
    allow_tf32(run.precision, ranks.device)
    folder = RunFolder(config.folder, config.keep_last)
    found = ranks.follow(folder.begin(config.resume, config.overwrite) if ranks.leads else None)
    notes = _resume(run, folder, found) if found else []
    log = _begin_log(run, folder, notes) if ranks.leads else None
    # An error must find the bar ended, or it would stand behind it on the same line.
    with log or nullcontext(), defer_interrupt() as interrupted:
        _fit(run, folder, log, interrupted)
    if not ranks.leads:
        return run.checkpoint()
    chosen = run.checkpoint() if config.hand_on == "last" else load_checkpoint(folder.best)
    sha256 = save_checkpoint(config.output, chosen)
    folder.finished.touch()
    return replace(chosen, sha256=sha256)


def _resume(run: Run, folder: RunFolder, found: Resumption) -> list[str]:
    """Go on from a checkpoint; return in words what was damaged and what is other than it was. Raises UserError."""
    try:
        notes = [*found.notes, *run.restore(found.path)]
    except UserError as error:  # what has been renamed is said in any case
        raise UserError("; ".join([str(error), *found.notes])) from error
    if found.best_is_lost:
        run.best_val = (run.losses["val"] or [math.inf])[-1]
        if run.ranks.leads:
            save_checkpoint(folder.best, run.checkpoint())
    return notes


def _fit(run: Run, folder: RunFolder, log: TrainingLog | None, interrupted: Callable[[], bool]) -> None:
    """Run the loop: update, and every so often evaluate and save.

    interrupted: says whether a signal asks this rank to end. All ranks then end with KeyboardInterrupt after an
    update that is saved, so that --resume loses nothing.
    """
    config, started_s = run.config, time.monotonic()
    if run.step == 0:
        _evaluate(run, folder, log)
    last = run.step >= config.max_steps
    while not last:
        late = config.minutes is not None and time.monotonic() - started_s > 60 * config.minutes
        begun_s = time.perf_counter()
        loss, grad_norm, late = update(run, late or interrupted())
        dt_s = time.perf_counter() - begun_s
        # A gradient that overflowed under fp16's scale is no divergence: the scaler skips that update.
        if not (math.isfinite(loss) and (math.isfinite(grad_norm) or run.scaler.is_enabled())):
            raise UserError(_diverged(run, folder, loss if math.isfinite(grad_norm) else grad_norm))
        asked = late or run.ranks.world == 1  # several ranks learn of a signal to one of them by the next update
        stopped = asked and any(run.ranks.gather(interrupted()))
        last = (late and not stopped) or run.step == config.max_steps
        if log:
            log.step(run.step, loss, learning_rate_at(run.step - 1, config), grad_norm, dt_s)
        if last or run.step % config.eval_interval == 0:
            _evaluate(run, folder, log)
            last = last or (config.patience is not None and run.stale >= config.patience)
        if last or stopped or (config.save_interval and run.step % config.save_interval == 0):
            training = run.training()
            if run.ranks.leads:
                folder.save(run.checkpoint(), training)
        if stopped and not last:
            run.ranks.follow(None)  # waits for rank 0 to have saved, as torchrun ends all after the first that leaves
            raise KeyboardInterrupt(f"step {run.step} is saved in {folder.path}; go on with --resume")


def update(run: Run, late: bool = False) -> tuple[float, float, bool]:
    """Take one step of the optimizer over one batch, which the ranks share and each takes in micro-batches.

    The batch's mean loss in nats a token, the gradient's norm before it is clipped, and whether any rank is late.
    """
    config, device = run.config, run.ranks.device
    loss = torch.zeros((), device=device)
    for number, (inputs, targets) in enumerate(run.batches.draw(), 1):
        early = number < run.batches.micro_steps  # gradients go between the ranks after the last micro-batch alone
        with run.model.no_sync() if early and isinstance(run.model, DistributedDataParallel) else nullcontext():
            with autocast(run.precision, device):
                share = loss_of(run.model(inputs), targets) / run.batches.micro_steps
            run.scaler.scale(share).backward()
        loss += share.detach()
    run.scaler.unscale_(run.optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(run.raw.parameters(), config.grad_clip or math.inf)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate_at(run.step, config)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    told = torch.stack([loss, grad_norm, torch.full_like(loss, late)])
    mean_loss, norm, lateness = run.ranks.mean(told).tolist()  # waits for the device
    return mean_loss, norm, lateness > 0


def _evaluate(run: Run, folder: RunFolder, log: TrainingLog | None) -> None:
    """Note the loss on both parts, and keep the model if it is the best so far."""
    losses = estimate_loss(run)
    for name, value in (("step", run.step), *losses.items()):
        run.losses[name].append(value)
    if log:
        log.evaluation(run.step, **losses)
    if not math.isfinite(losses["train"]):
        raise UserError(_diverged(run, folder, losses["train"]))
    run.stale += 1
    if losses["val"] < run.best_val:
        run.best_val, run.stale = losses["val"], 0
        if run.ranks.leads:
            save_checkpoint(folder.best, run.checkpoint())


def _diverged(run: Run, folder: RunFolder, value: float) -> str:
    """The words that end a run whose loss or gradient is NaN or infinite, naming the last good checkpoint."""
    good = folder.steps()[-1:] or [folder.best][: folder.best.exists()]
    kept = f"{good[0]} is the last good checkpoint" if good else "no checkpoint was kept yet"
    return f"the loss or its gradient is {value} at step {run.step}: training diverged; lower --learning-rate; {kept}"


@torch.no_grad()
def estimate_loss(run: Run) -> dict[str, float]:
    """Return the mean loss on `train` and `val` in nats a token, over the same eval_batches batches every time."""
    run.raw.eval()
    means = []
    for part in ("train", "val"):
        batches, total = batches_of(run.config, run.corpus, run.ranks, part), torch.zeros((), device=run.ranks.device)
        for _ in range(run.config.eval_batches):
            for inputs, targets in batches.draw():
                with autocast(run.precision, run.ranks.device):
                    total += loss_of(run.compute(inputs), targets)
        means.append(total / (run.config.eval_batches * batches.micro_steps))
    run.raw.train()
    train_loss, val_loss = run.ranks.mean(torch.stack(means).float()).tolist()
    return {"train": train_loss, "val": val_loss}


def _begin_log(run: Run, folder: RunFolder, notes: list[str]) -> TrainingLog:
    """Say what is about to run, store its settings, and open the log."""
    config, corpus, ranks = run.config, run.corpus, run.ranks
    settings = " ".join(f"{name}={value}" for name, value in plain(config).items())
    print("\n".join(textwrap.wrap(f"config: {settings}", 119, subsequent_indent="  ", break_on_hyphens=False)))
    print(f"corpus: {corpus.name}; {len(corpus.train):,} tokens to train on, {len(corpus.val):,} to validate on")
    if isinstance(corpus.tokenizer, GPT2Tokenizer) and not (config.corpus and config.corpus.is_dir()):
        print(f"byte pairs: {corpus.tokenizer.table}")
    shape, dtype = run.raw.config, DTYPES.get(run.precision, torch.float32)
    attention = "" if shape.model == "bigram" else f", attention by {sdpa_backend(shape, ranks.device, dtype)}"
    print(
        f"model: {run.raw.parameter_count():,} parameters, {shape.vocab_size:,} different tokens; on "
        f"{ranks.device} in {run.precision}{attention}" + (f", {ranks.world} ranks" if ranks.world > 1 else "")
    )
    if run.step:
        print(f"resumed: at step {run.step} of {folder.path}" + "".join(f"; {note}" for note in notes))
    folder.write_config(config)
    share = _share_of_peak(run)
    board = folder.tensorboard if config.tensorboard else None
    tokens = config.batch_size * config.block_size
    return TrainingLog(folder.log, board, run.step, config.max_steps, tokens, share)


def _share_of_peak(run: Run) -> float | None:
    """Return which share of all devices' peak an update a second would be; None for a model without matrix products."""
    config = run.config
    flops = training_flops_per_token(run.raw.config, config.block_size) * config.batch_size * config.block_size
    if not flops:
        return None
    peak, source = peak_flops(run.ranks.device, run.precision)
    print(f"peak: {peak / 1e12:.3g} TFLOP/s a rank, by {source}", flush=True)
    return flops / (peak * run.ranks.world)


def sample(checkpoint: Checkpoint, tokens: int, seed: int) -> str:
    """Return a text by the model from a line's, or with GPT-2's tokens a document's, start on."""
    tokenizer = tokenizer_from_json(checkpoint.tokenizer)
    if isinstance(tokenizer, GPT2Tokenizer):
        start = [tokenizer.end_of_text]
    elif isinstance(tokenizer, CharTokenizer):
        start = tokenizer.encode("\n" if "\n" in tokenizer.characters else tokenizer.characters[0])
    else:
        tokenizer.encode("")  # raises the UserError that says so
    return tokenizer.decode(generate(checkpoint.build("sdpa"), start, tokens, temperature=0.8, seed=seed))


def parse(arguments: list[str] | None = None) -> TrainConfig:
    """Return the run that a command line asks for: a preset's name, `demo` by default, then overrides of its fields."""
    presets = tyro.extras.subcommand_type_from_defaults(
        defaults={name: config for name, (_, config) in PRESETS.items()},
        descriptions={name: description for name, (description, _) in PRESETS.items()},
    )
    return parse_settings(
        presets,
        prog="python -m gpt.train",
        args=arguments,
        default=PRESETS["demo"][1],
        description="Train a GPT and write a checkpoint: one process, or as many as torchrun starts. "
        "A preset comes first, then what to change in it; PRESET --help shows its values.",
        config=(tyro.conf.CascadeSubcommandArgs,),
    )


def main() -> None:
    """Parse the command line, train, and print where the model is and what it writes."""
    config = parse()
    sources = (config.corpus, config.init_from)  # each a file, a folder, a name or None
    if is_first_process():
        check_output(config.output, *(source for source in sources if source is not None and Path(source).exists()))
    checkpoint = train(config)
    if is_first_process():
        print(f"\nsample:\n{sample(checkpoint, tokens=400, seed=config.seed)}\n")
        print(f"run: {config.folder}\ncheckpoint: {config.output}")
