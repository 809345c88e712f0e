"""Inputs for foreign files, by the names that exporters give them. Runs in the environment of `make matrix` too."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

VOCAB_SIZE = 199
LONGEST = 48  # the most tokens of the models that have a table of positions
_DTYPES = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(float16)": np.float16}


def feed(
    inputs: Iterable[tuple[str, str, Sequence[int | str]]], rng: np.random.Generator, B: int, P: int, T: int
) -> dict[str, np.ndarray]:
    """Return values of inputs, each (name, ONNX Runtime's type, shape), for B sequences of T tokens after P of a past.

    Ids and the past are random, the mask is ones, positions count on.
    """
    given = {}
    value: np.ndarray
    for name, kind, shape in inputs:
        if name.startswith("past"):
            value = rng.standard_normal((B, int(shape[1]), P, int(shape[3])))
        elif "mask" in name:
            value = np.ones((B, P + T))
        elif "position" in name:
            value = np.broadcast_to(np.arange(P, P + T), (B, T))
        else:
            value = rng.integers(0, VOCAB_SIZE, (B, T))
        given[name] = np.ascontiguousarray(value.astype(_DTYPES.get(kind, np.float32)))
    return given


def padded(given: Mapping[str, np.ndarray], lengths: Sequence[int]) -> dict[str, np.ndarray]:
    """Hide the first tokens of each sequence, or the last where its number is negative; positions follow the mask."""
    result = dict(given)
    for name, mask in given.items():
        if "mask" in name:
            hidden = mask.copy()
            for row, length in zip(hidden, lengths, strict=True):
                row[: max(length, 0)] = 0
                row[len(row) + min(length, 0) :] = 0
            result[name] = hidden
            positions = np.maximum(np.cumsum(hidden, axis=1) - 1, 0)
            for other, counted in given.items():
                if "position" in other:
                    result[other] = positions[:, -counted.shape[1] :].astype(counted.dtype)
    return result
