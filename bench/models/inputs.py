"""What an ONNX file is given for token ids."""

from pathlib import Path

import numpy as np

from export.signature import PAST, Signature, dtype_named


class Inputs:
    """Makes the inputs of a file, in its types. Masks and positions are kept for the next ids of the same shape."""

    def __init__(self, signature: Signature) -> None:
        assert signature.ids is not None  # `bench.models.external.read_external` has seen to it
        self.signature, self.ids = signature, signature.ids
        self._dtype = dtype_named(signature.input(signature.ids).dtype)
        self._last: tuple[int, ...] | None = None
        self._others: dict[str, np.ndarray] = {}

    def __call__(self, ids: np.ndarray, tokens: int = 0) -> dict[str, np.ndarray]:
        """Return all inputs but the past for ids int64 [B, T] after so many tokens. Raises UserError for a shape."""
        asked = (*ids.shape, tokens)
        if self._last != asked:
            past = {
                name: np.broadcast_to(np.int8(0), (tokens,) * len(self.signature.input(name).dims))
                for name in self.signature.past
            }  # of which the number of tokens alone is looked at
            given = self.signature.feed(ids, past)
            others = {name: value for name, value in given.items() if self.signature.roles.get(name, PAST) != PAST}
            self._last, self._others = asked, others
        return {self.ids: np.ascontiguousarray(ids, self._dtype)} | self._others

    def empty(self, B: int) -> dict[str, np.ndarray]:
        """Return the past of no tokens for B sequences."""
        return {name: self.signature.empty(name, B) for name in self.signature.past}


def inputs_of(path: Path) -> Inputs:
    """Return what makes the inputs of an ONNX file, whose weights are not read."""
    from export.artifact import read_proto
    from export.interface import signature_of

    return Inputs(signature_of(read_proto(path)))
