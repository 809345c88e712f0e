"""Weights of linear layers as kernels read them: rounded to fewer bits, in words and panels, by numpy."""

import numpy as np

from tvm_frontend.kernels.cpu.register_tile import Tile

GROUP = 32  # values of a column that share a scale in int4, and of a row that is multiplied by it


def words_of(rounded: np.ndarray, words: int, values: int) -> np.ndarray:
    """Numbers [K, N] as int32 [words, N] of so many consecutive k each, filled up with zeros."""
    K, N = rounded.shape
    filled = np.zeros((words * values, N), rounded.dtype)
    filled[:K] = rounded
    by_word = filled.reshape(-1, values, N).swapaxes(1, 2)  # [words, N, values]
    return np.ascontiguousarray(by_word).view(np.int32)[..., 0]


def pack_panels(words: np.ndarray, tile: Tile) -> np.ndarray:
    """Words [rows, N] as panels [ceil(N / columns), rows, columns], with zeros at the end."""
    (rows, N), columns = words.shape, tile.columns
    whole, rest = divmod(N, columns)
    packed = np.zeros((-(-N // columns), rows, columns), words.dtype)
    packed[:whole] = words[:, : whole * columns].reshape(rows, whole, columns).swapaxes(0, 1)
    packed[whole:, :, :rest] = words[:, whole * columns :]
    return packed


def group_words(tile: Tile) -> int:
    """Words of one group of a panel in int4: GROUP values of each column, and two bfloat16 scales a word."""
    return GROUP // 8 * tile.columns + tile.columns // 2


def pack_groups(weight: np.ndarray, tile: Tile) -> np.ndarray:
    """Weight float32 [K, N] as [panels, groups, group_words]: whole numbers of 4 bits and their scales.

    A number stands for (number - 8) · scale. A word has eight of a column: in the lower halves of its bytes the first
    four, in the upper ones the next. Behind them, in the lower half of word i, the scale of column i, and in the upper
    one that of column i + columns / 2. The scale makes the largest of a group -8: its sign is that number's.
    """
    K, N = weight.shape
    groups, columns = -(-K // GROUP), tile.columns
    panels = -(-N // columns)
    filled = np.zeros((groups * GROUP, panels * columns), np.float32)
    filled[:K, :N] = weight
    filled = filled.reshape(groups, GROUP, -1)
    lowest, highest = filled.min(1), filled.max(1)
    bits = to_bf16(np.where(highest > -lowest, highest, lowest) / np.float32(-8))  # [groups, N]
    scales = (bits.astype(np.uint32) << 16).view(np.float32)
    inverse = 1 / np.where(scales == 0, np.float32(1), scales)
    numbers = np.clip(np.rint(filled * inverse[:, None]) + 8, 0, 15).astype(np.uint8)
    halves = numbers.reshape(groups, GROUP // 8, 2, 4, panels, columns)
    bytes_ = (halves[:, :, 0] | halves[:, :, 1] << 4).transpose(3, 0, 1, 4, 2)  # [panels, groups, words, columns, 4]
    words = np.ascontiguousarray(bytes_).view(np.int32).reshape(panels, groups, -1)
    of_columns = bits.reshape(groups, panels, 2, columns // 2).transpose(1, 0, 3, 2)
    return np.concatenate([words, np.ascontiguousarray(of_columns).view(np.int32)[..., 0]], axis=-1)


def scales_of(weight: np.ndarray) -> np.ndarray:
    """By which a column's int8 are multiplied: its largest |weight| is 127 of them."""
    return np.abs(weight).max(0) / np.float32(127)


def to_int8(weight: np.ndarray) -> np.ndarray:
    scales = scales_of(weight)
    return np.rint(weight / np.where(scales == 0, np.float32(1), scales)).astype(np.int8)


def to_bf16(weight: np.ndarray) -> np.ndarray:
    """The upper half of each float32, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(weight).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
