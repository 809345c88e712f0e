"""Weights of linear layers in the layout that the micro-kernel reads: quantised, packed into int32, in panels (numpy).

fp32, bf16 and int8, with the pack factor p = 1, 2 or 4 consecutive k per 32-bit storage element:

    W [K, N]                               packed [N/NR, K/p, NR]
         n →                               panel 0            panel 1
      k  +------ NR ------+------ NR ----  +----- NR -----+   +----- NR -----+
      ↓  | row 0          | row 0          | k = 0 … p-1  |   | k = 0 … p-1  |   in memory: left to right,
         | row 1          | row 1          | k = p … 2p-1 |   | k = p … 2p-1 |   then down, then the next panel
         | …              | …              | …            |   | …            |

    storage element of column n:  | k+p-1 | … | k+1 | k |   lowest bits: first k

int4, in groups of GROUP_SIZE = 32 consecutive k that share a scale per column, packed [N/NR, K/32, 4 NR + NR/2]:

    one group of one panel:   4 rows of NR elements, 8 k each        NR/2 elements, 2 bf16 scales each
                            | k 0…7 | k 8…15 | k 16…23 | k 24…31 | scales |

    element of column n, byte b:  | k+4+b : 4 bits | k+b : 4 bits |   upper and lower nibble, b = 0 … 3
    scale element i:              | bf16 of column i + NR/2 | bf16 of column i |

K and N that are no multiples are padded with zeros.
"""

import ml_dtypes
import numpy as np

from tvm_frontend.kernels.cpu.register_tile import Tile

GROUP_SIZE = 32  # consecutive k that share one scale in int4: of a column of W, and of a row of x


def pack_elements(quantized: np.ndarray, rows: int, pack_factor: int) -> np.ndarray:
    """Pack [K, N] of 1- or 2-byte elements as int32 [rows, N], pack_factor consecutive k each, padded with zeros."""
    K, N = quantized.shape
    padded = np.zeros((rows * pack_factor, N), quantized.dtype)
    padded[:K] = quantized
    consecutive = padded.reshape(-1, pack_factor, N).swapaxes(1, 2)  # [rows, N, pack_factor]
    return np.ascontiguousarray(consecutive).view(np.int32)[..., 0]


def pack_panels(elements: np.ndarray, tile: Tile) -> np.ndarray:
    """Arrange storage elements [rows, N] as panels [ceil(N / NR), rows, NR], padded with zeros."""
    (rows, N), NR = elements.shape, tile.nr
    full, tail = divmod(N, NR)
    packed = np.zeros((-(-N // NR), rows, NR), elements.dtype)
    packed[:full] = elements[:, : full * NR].reshape(rows, full, NR).swapaxes(0, 1)
    packed[full:, :, :tail] = elements[:, full * NR :]
    return packed


def group_elements(tile: Tile) -> int:
    """Return the storage elements of one group of an int4 panel: eight k per element, then two bf16 scales each."""
    return GROUP_SIZE // 8 * tile.nr + tile.nr // 2


def pack_groups(weight: np.ndarray, tile: Tile) -> np.ndarray:
    """Quantise a weight, float32 [K, N], group-wise to int4 and pack it as int32 [panels, groups, group_elements].

    A stored q in 0 … 15 stands for (q - 8) * scale: the zero point is 8. The scale makes the element of largest
    magnitude in its group exactly -8, so it has the opposite sign of that element.
    """
    K, N = weight.shape
    groups, NR = -(-K // GROUP_SIZE), tile.nr
    panels = -(-N // NR)
    padded = np.zeros((groups * GROUP_SIZE, panels * NR), np.float32)
    padded[:K, :N] = weight
    padded = padded.reshape(groups, GROUP_SIZE, -1)
    lowest, highest = padded.min(1), padded.max(1)
    scales = to_bf16(np.where(highest > -lowest, highest, lowest) / np.float32(-8))  # [groups, N]
    scales_fp32 = scales.astype(np.float32)
    reciprocals = 1 / np.where(scales_fp32 == 0, np.float32(1), scales_fp32)
    q = np.clip(np.rint(padded * reciprocals[:, None]) + 8, 0, 15).astype(np.uint8)
    nibbles = q.reshape(groups, GROUP_SIZE // 8, 2, 4, panels, NR)
    bytes_ = (nibbles[:, :, 0] | nibbles[:, :, 1] << 4).transpose(3, 0, 1, 4, 2)  # [panels, groups, 4, NR, 4]
    elements = np.ascontiguousarray(bytes_).view(np.int32).reshape(panels, groups, -1)
    pairs = scales.view(np.uint16).reshape(groups, panels, 2, NR // 2).transpose(1, 0, 3, 2)
    return np.concatenate([elements, np.ascontiguousarray(pairs).view(np.int32)[..., 0]], axis=-1)


def column_scales(weight: np.ndarray) -> np.ndarray:
    """Return the symmetric int8 scale of each column of a weight [K, N]: absmax / 127."""
    return np.abs(weight).max(0) / np.float32(127)


def quantize_columns(weight: np.ndarray) -> np.ndarray:
    """Quantise a weight, float32 [K, N], to int8 with a scale per column, `column_scales`."""
    scales = column_scales(weight)
    return np.rint(weight / np.where(scales == 0, np.float32(1), scales)).astype(np.int8)


def to_bf16(weight: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16, to nearest even; a NaN stays one of the same sign."""
    with np.errstate(invalid="ignore"):  # numpy warns of a signalling NaN, which becomes a quiet one
        return weight.astype(ml_dtypes.bfloat16)
