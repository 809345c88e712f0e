"""The reference that every engine is compared with: the eager model in float64."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from bench.backends import eager
from bench.correctness.agreement import PRECISIONS, Errors, measure_allowed
from bench.correctness.rounding import Array, Rounding
from bench.harness.runner import CALL_DEADLINE_S, LOAD_DEADLINE_S
from bench.harness.worker import Worker
from bench.models.artifacts import Artifacts
from bench.models.shape import Model

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gpt.bigram import Bigram
    from gpt.checkpoint import Checkpoint
    from gpt.model import GPT

FACTORY = f"{__name__}:Reference"


class Reference(eager.Engine):
    """Eager in float64; its logits are float64 [B, T, V]. Not an engine: it is never timed."""

    summary = "eager in float64"
    measure = "PyTorch itself"
    judges: ClassVar[dict[str, str]] = {name: precision.judge for name, precision in PRECISIONS.items()}
    arithmetic = "float64"

    def _load(self, artifacts: Artifacts, threads: int) -> None:
        import torch

        from gpt.checkpoint import load_checkpoint

        torch.set_num_threads(threads)
        self._checkpoint = load_checkpoint(artifacts.checkpoint)
        self._rounding: Rounding | None = None
        self._model = in_float64(self._checkpoint)

    def logits(self, ids: np.ndarray, rounding: Rounding | None = None) -> np.ndarray:
        """Compute logits float64 [B, T, V] of ids int64 [B, T], by the model with its weights rounded, if they are."""
        self._take(rounding)
        return self.prefill(ids)

    def allowed(self, precision: str, rounding: Rounding | None, seed: int) -> Errors:
        """Measure the errors that an engine of a precision may have; see `measure_allowed`."""
        self._take(rounding)
        return _allowed(self._model, self._checkpoint, precision, rounding, seed)

    def loss(self, windows: np.ndarray) -> float:
        """Compute the loss of the model as it is; see `Backend.loss`."""
        self._take(None)
        return super().loss(windows)

    def _take(self, rounding: Rounding | None) -> None:
        """Hold the model with its weights rounded so; one at a time, as in float64 each is twice the checkpoint."""
        if self._rounding != rounding:
            self._model, self._rounding = in_float64(self._checkpoint, rounding), rounding


def in_float64(checkpoint: "Checkpoint", rounding: Rounding | None = None) -> "GPT | Bigram":
    """Build the model in float64 with explicit attention, its weights rounded if a rounding is given."""
    model = checkpoint.build(attention="explicit").double()
    if rounding is not None:
        round_weights(eager.gpt_of(model), rounding)
    return model


def round_weights(model: "GPT", rounding: Rounding) -> None:
    """Round the weights of a model in float64; a head that is the embedding gets weights of its own."""
    import torch
    from torch import nn

    def rounded(by: Callable[[Array, int], Array], weight: "Tensor") -> nn.Parameter:
        return nn.Parameter(torch.from_numpy(by(weight.detach().numpy(), model.config.n_embd)), requires_grad=False)

    model.lm_head.weight = rounded(rounding.head or rounding.weights, model.lm_head.weight)
    for block in model.transformer.h:
        for linear in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
            linear.weight = rounded(rounding.weights, linear.weight)
    if rounding.tables:
        for table in (model.transformer.wte, model.transformer.wpe):
            table.weight = rounded(rounding.tables, table.weight)


def allowed_of(checkpoint: "Checkpoint", precision: str, rounding: Rounding | None = None, seed: int = 0) -> Errors:
    """Measure on the CPU the errors that an engine of a precision may have; see `measure_allowed`.

    rounding: of an engine in int8 or int4.
    """
    return _allowed(in_float64(checkpoint, rounding), checkpoint, precision, rounding, seed)


def _allowed(
    judge: "GPT | Bigram", checkpoint: "Checkpoint", precision: str, rounding: Rounding | None, seed: int
) -> Errors:
    if rounding is None:
        measure = in_precision(checkpoint, precision)
    else:
        measure = in_float64(checkpoint, rounding)
        round_while_running(eager.gpt_of(measure), rounding)
    return measure_allowed(partial(logits_of, judge), partial(logits_of, measure), checkpoint.config, seed)


def in_precision(checkpoint: "Checkpoint", precision: str) -> "GPT | Bigram":
    """Build the model with explicit attention, all of it in fp32, bf16 or fp16."""
    import torch

    return checkpoint.build(attention="explicit").to(getattr(torch, PRECISIONS[precision].dtype))


def logits_of(model: "GPT | Bigram", ids: np.ndarray) -> np.ndarray:
    """Compute a model's logits, as float64 [B, T, V], of ids int64 [B, T] on the device where it is."""
    import torch

    device = next(model.parameters()).device
    with torch.inference_mode():
        return model(torch.from_numpy(ids).to(device)).double().cpu().numpy()


def round_while_running(model: "GPT", rounding: Rounding) -> None:
    """Have each linear layer round what it is given, and each attention its keys and values."""
    import torch

    def round_input(_layer: "nn.Module", inputs: tuple["Tensor", ...]) -> tuple["Tensor", ...]:
        return tuple(torch.from_numpy(rounding.activations(x.numpy())) for x in inputs)

    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_pre_hook(round_input)
    if rounding.cached is not None:
        for block in model.transformer.h:
            block.attn.attend = partial(_attend_to_rounded, block.attn.attend, rounding.cached)


def _attend_to_rounded(
    attend: Callable[["Tensor", "Tensor", "Tensor", float, float], "Tensor"],
    rounded: Callable[[Array], Array],
    q: "Tensor",
    k: "Tensor",
    v: "Tensor",
    dropout: float,
    scale: float,
) -> "Tensor":
    import torch

    return attend(q, torch.from_numpy(rounded(k.numpy())), torch.from_numpy(rounded(v.numpy())), dropout, scale)


class ReferenceModel:
    """The reference in a worker of its own; see `bench.harness.work.Reference`. Use it as a context manager.

    The logits of the last ids are kept, as engine after engine asks for the same. seed: of the random ids on which the
    allowed errors are measured. factory: `module:Class` of the model. Raises WorkerError if the model does.
    """

    def __init__(
        self, artifacts: Artifacts, config: Model, threads: int, factory: str = FACTORY, seed: int = 0
    ) -> None:
        self._worker = Worker(factory, threads)
        self._arguments = (artifacts, config, threads, "")
        self._seed = seed
        self._last: tuple[np.ndarray, Rounding | None, np.ndarray] | None = None
        self._allowed: dict[tuple[str, Rounding | None], Errors] = {}

    def __enter__(self) -> "ReferenceModel":
        try:
            self._worker.call("load", *self._arguments, deadline_s=LOAD_DEADLINE_S)
        except BaseException:
            self._worker.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.close()

    def __call__(
        self, ids: np.ndarray, positions: Sequence[int] | None = None, rounding: Rounding | None = None
    ) -> np.ndarray:
        if self._last is None or self._last[1] != rounding or not np.array_equal(self._last[0], ids):
            self._last = ids, rounding, self._worker.call("logits", ids, rounding, deadline_s=CALL_DEADLINE_S)
        logits = self._last[2]  # [B, T, V]
        return logits if positions is None else logits[:, list(positions)]

    def allowed(self, precision: str, rounding: Rounding | None = None) -> Errors:
        """Return the errors that an engine of a precision and a rounding may have; measured once."""
        asked = precision, rounding
        if asked not in self._allowed:
            self._allowed[asked] = self._worker.call("allowed", *asked, self._seed, deadline_s=CALL_DEADLINE_S)
        return self._allowed[asked]

    def loss(self, windows: np.ndarray) -> float:
        """Compute the loss, in nats per token, on windows of a text, int64 [N, T + 1]."""
        return self._worker.call("loss", windows, deadline_s=CALL_DEADLINE_S)
