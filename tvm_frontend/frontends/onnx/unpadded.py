"""Batches without padding: what the inputs are that Hugging Face's exporters add for padding, where there is none.

A mask that is an input hides what its values say, so attention with it has no kernel. Of sequences of one length it
holds ones, and positions are counted; a graph read for these alone has plainly causal attention, which has a kernel.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import tvm
from tvm import relax

from tvm_frontend.frontends.onnx.operators.symbolic import Indexed, simplified

MASK, POSITIONS = "attention_mask", "position_ids"  # their names in files of transformers and optimum


def unpadded(inputs: list[relax.Var]) -> dict[str, Indexed]:
    """Give the formulas of a graph's mask [B, P + T] and positions [B, T] for a batch without padding.

    Only for integers of two dimensions of those names; P is the length of the past, 0 without one.
    """
    found = {var.name: var for var in inputs if var.name in (MASK, POSITIONS) and _is_matrix_of_integers(var)}
    formulas = {}
    if (mask := found.get(MASK)) is not None:
        dtype = str(mask.ty.dtype)
        formulas[MASK] = Indexed(list(mask.ty.shape.values), dtype, lambda *_: tvm.tirx.const(1, "int64"))
    if (positions := found.get(POSITIONS)) is not None:
        past = _past_length(inputs)
        formulas[POSITIONS] = Indexed(
            list(positions.ty.shape.values), str(positions.ty.dtype), lambda b, t: simplified(past + t)
        )
    return formulas


def is_unpadded(given: Mapping[str, np.ndarray]) -> bool:
    """Tell if the inputs of a call are those of a batch without padding, for which `unpadded` has formulas."""
    mask, positions = given.get(MASK), given.get(POSITIONS)
    if mask is not None and not (mask == 1).all():
        return False
    if positions is None:
        return True
    past = next((array.shape[2] for array in given.values() if array.ndim == 4), 0)
    return bool((positions == past + np.arange(positions.shape[1])).all())


def _is_matrix_of_integers(var: relax.Var) -> bool:
    return str(var.ty.dtype) in ("int32", "int64") and len(var.ty.shape.values) == 2


def _past_length(inputs: list[relax.Var]) -> Any:
    """Give P from the first input [B, nh, P, hs], 0 if there is none."""
    caches = (var.ty.shape.values for var in inputs if len(var.ty.shape.values) == 4)
    return next((shape[2] for shape in caches), 0)
