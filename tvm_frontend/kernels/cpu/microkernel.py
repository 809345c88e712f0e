"""The inner loop of linear layers: some rows of x by one panel of packed weights, added up in registers."""

from collections.abc import Callable

from tvm.script import tirx as T

from tvm_frontend.kernels.cpu.formats import Arithmetic
from tvm_frontend.kernels.cpu.packing import GROUP
from tvm_frontend.kernels.cpu.register_tile import Tile, clear

SPAN = 64  # turns of the loop that add to one float32 sum: in longer ones roundings add up
UNROLL = 4  # steps of k in one turn of the loop; without it the loop's own bookkeeping costs up to half
LINE_WORDS = 16  # of a cache line
# A panel up to this size is fetched while the one before it is used: both stay in a core's own cache beside the rows.
FETCHED_BYTES = 2**17
LOW_HALVES, UPPER_HALF = 0x0F0F0F0F, -0x10000  # of the bytes of a word; of a word
# It touches no memory that the program sees and returns: else sums in registers would be stored at each turn.
FETCH = """
define linkonce_odr hidden i32 @fetch(ptr %p) alwaysinline {
  call void asm sideeffect "prefetcht1 ($0)", "r"(ptr %p) nounwind willreturn memory(inaccessiblemem: readwrite)
  ret i32 0
}
"""


@T.macro
def fetch(element):
    """Begin to bring the cache line of an element near."""
    T.evaluate(T.call_extern("int32", "fetch", T.address_of(element)))


def sums_of(rows: int, arithmetic: Arithmetic) -> int:
    """Rows of accumulators that `product` needs. Few rows would wait for one another's sums: they have several each."""
    return rows if arithmetic.grouped else rows * _splits(rows)


def product(K: int, panels: int, tile: Tile, arithmetic: Arithmetic) -> Callable:
    """A macro (rows, acc, x, scales, offsets, w, panel, first, last, ahead): the first rows of acc = x · panel.

    Rows of x beyond `last` are the last one again. scales, offsets: of x by groups. ahead: how many tiles of rows have
    gone by this panel, to fetch the next one a bit with each; None to leave that to the machine. It calls FETCH.
    """
    return _by_group(K, tile, arithmetic) if arithmetic.grouped else _by_column(K, panels, tile, arithmetic)


def _splits(rows: int) -> int:
    return max(1, UNROLL // rows)


def _by_column(K: int, panels: int, tile: Tile, arithmetic: Arithmetic) -> Callable:
    NR, LANES, VECTORS = tile.columns, tile.lanes, tile.vectors
    WORDS, dot = arithmetic.words(K), arithmetic.dot
    TURNS = WORDS // UNROLL
    SPANS = -(-TURNS // SPAN) if arithmetic.values == 1 else 1
    FETCHED = 4 * WORDS * NR <= FETCHED_BYTES
    TILES_AHEAD = max(1, NR * UNROLL // LINE_WORDS)  # a line a turn fetches the whole panel

    @T.macro
    def step(rows, sums, acc, x, w, panel, first, last, k):
        for i in T.unroll(rows):
            for v in T.unroll(VECTORS):
                acc[sums + i, T.ramp(v * LANES, 1, LANES)] = dot(
                    acc[sums + i, T.ramp(v * LANES, 1, LANES)],
                    x[T.min(first + i, last), k],
                    w[panel, k, T.ramp(v * LANES, 1, LANES)],
                )

    @T.macro
    def add_sums(rows, sums, more, begin):
        for i in T.unroll(rows):
            for v in T.unroll(VECTORS):
                columns = T.meta_var(T.ramp(v * LANES, 1, LANES))
                sums[i, columns] = sums[i, columns] + more[begin + i, columns]

    @T.macro
    def add_products(rows, splits, sums, x, w, panel, first, last, ahead, begin, turns):
        for each in range(turns):
            turn: T.let = begin + each
            if ahead is not None and FETCHED:
                line = T.meta_var(ahead % TILES_AHEAD * TURNS + turn)
                fetch(w[T.min(panel + 1, panels - 1), 0, line * LINE_WORDS])
            for u in T.unroll(UNROLL):
                step(rows, u % splits * rows, sums, x, w, panel, first, last, turn * UNROLL + u)

    @T.macro
    def multiply(rows, acc, x, scales, offsets, w, panel, first, last, ahead):
        splits = T.meta_var(_splits(rows))
        sums = T.meta_var(Tile(splits * rows, VECTORS, LANES))
        clear(sums, acc)
        if SPANS > 1:
            part = T.alloc_buffer((splits * rows, NR), arithmetic.total)
            for span in range(SPANS):
                turns = T.meta_var(T.min(SPAN, TURNS - span * SPAN))
                clear(sums, part)
                add_products(rows, splits, part, x, w, panel, first, last, ahead, span * SPAN, turns)
                add_sums(splits * rows, acc, part, 0)
        else:
            add_products(rows, splits, acc, x, w, panel, first, last, ahead, 0, TURNS)
        for u in T.unroll(WORDS % UNROLL):
            step(rows, u % splits * rows, acc, x, w, panel, first, last, TURNS * UNROLL + u)
        for s in T.unroll(splits - 1):
            add_sums(rows, acc, acc, (s + 1) * rows)

    return multiply


def _by_group(K: int, tile: Tile, arithmetic: Arithmetic) -> Callable:
    """Whole numbers within a group; each group's sum then has its scales. See `packing` for a group's words."""
    NR, LANES, VECTORS = tile.columns, tile.lanes, tile.vectors
    GROUPS, PAIRS, dot = -(-K // GROUP), GROUP // 8, arithmetic.dot

    def half_of(words, half):
        return T.bitwise_and(T.shift_right(words, T.broadcast(4 * half, LANES)), T.broadcast(LOW_HALVES, LANES))

    def scale_of(words, v):
        return T.reinterpret("float32", T.bitwise_and(T.shift_left(words, 16 - 16 * v), T.int32(UPPER_HALF)))

    @T.macro
    def multiply(rows, acc, x, scales, offsets, w, panel, first, last, ahead):
        whole = T.alloc_buffer((rows, NR), "int32")
        clear(Tile(rows, VECTORS, LANES), acc)
        for g in range(GROUPS):
            for i in T.unroll(rows):
                for c in T.vectorized(NR):
                    whole[i, c] = offsets[T.min(first + i, last), g]
            for pair in T.unroll(PAIRS):
                for half in T.unroll(2):
                    for v in T.unroll(VECTORS):
                        for i in T.unroll(rows):
                            whole[i, T.ramp(v * LANES, 1, LANES)] = dot(
                                whole[i, T.ramp(v * LANES, 1, LANES)],
                                x[T.min(first + i, last), (g * PAIRS + pair) * 2 + half],
                                half_of(w[panel, g, T.ramp(pair * NR + v * LANES, 1, LANES)], half),
                            )
            for v in T.unroll(VECTORS):
                for i in T.unroll(rows):
                    for lane in T.vectorized(LANES):
                        acc[i, v * LANES + lane] = acc[i, v * LANES + lane] + T.Cast(
                            "float32", whole[i, v * LANES + lane]
                        ) * (scale_of(w[panel, g, PAIRS * NR + lane], v) * scales[T.min(first + i, last), g])

    return multiply
