// Linear layers: out [M, N] = activation(x [M, K] · Wᵀ + bias) [+ residual]. W is stored as [N, K]: both operands are
// contiguous along K. Two kernels: `linear` on tensor cores, `skinny_gemm` for up to 8 rows.
//
// linear: one block computes a BLOCK_M × BLOCK_N tile of out (128 × 128 or 64 × 64).
//
//   loop                        over                          operands come from
//   blockIdx.x, blockIdx.y      tiles of M, tiles of N        global memory; blocks that run together have
//                                                             neighbouring x, so they share a tile of W in L2
//   k_tile                      K, 64 bytes a row             shared memory: a ring of STAGES tiles filled by cp.async
//   k_step (2 per k_tile)       32 bytes of a k_tile          registers: A and B fragments by ldmatrix
//   warp                        WARPS_M × WARPS_N             each warp has WARP_M × WARP_N of the block's tile
//   i, j                        WARP_MMA_M × WARP_MMA_N       float32 accumulators, in registers for the whole K loop
//   epilogue                    accumulators                  bias, activation and residual, then one store a pair
//
// A tile in shared memory: rows of 64 bytes, four 16-byte chunks each, chunk c of row r at slot c ^ (r / 2 % 4):
//
//   row 0 │ 0 1 2 3      two rows are the 128 bytes that the 32 banks serve at once, so of any chunk
//   row 1 │ 0 1 2 3      the eight rows that one ldmatrix matrix reads are in eight different
//   row 2 │ 1 0 3 2      groups of four banks: no conflict
//   row 3 │ 1 0 3 2
//   row 4 │ 2 3 0 1
//   …
//
// skinny_gemm is bound by reading W once, and uses no tensor cores:
//
//   blockIdx.x, warp            N, COLUMNS each               each warp has whole columns (rows of W)
//   chunk                       K, 16 bytes a lane            one coalesced 512-byte read of a W row a warp
//   r, c                        ROWS × COLUMNS                float32 sums in registers, reduced over the warp

namespace gpt_frontend {

struct Identity {
  static __device__ float of(float x) { return x; }
};

struct Relu {
  static __device__ float of(float x) { return x > 0.0f ? x : 0.0f; }
};

// The tanh approximation of GELU, 0.5 x (1 + tanh u) with u = √(2/π) (x + 0.044715 x³), as x · sigmoid(2u).
struct GeluTanh {
  static __device__ float of(float x) {
    const float minus_2u_log2e = x * (-2.302208198f - 0.1029432397f * x * x);
    return x / (1.0f + exp2_approx(minus_2u_log2e));
  }
};

struct Gelu {
  static __device__ float of(float x) { return 0.5f * x * (1.0f + erff(x * 0.7071067812f)); }
};

// Store results as 16-bit elements. store_pair writes elements index and index + 1; its index is even.
template <class DTypeTraits>
struct StoreHalf {
  static __device__ void store(void* out, long long index, float value) {
    static_cast<unsigned short*>(out)[index] = static_cast<unsigned short>(DTypeTraits::pack(value, 0.0f));
  }
  static __device__ void store_pair(void* out, long long index, float first, float second) {
    *reinterpret_cast<unsigned*>(static_cast<unsigned short*>(out) + index) = DTypeTraits::pack(first, second);
  }
};

// Store results as float32.
struct StoreF32 {
  static __device__ void store(void* out, long long index, float value) { static_cast<float*>(out)[index] = value; }
  static __device__ void store_pair(void* out, long long index, float first, float second) {
    *reinterpret_cast<float2*>(static_cast<float*>(out) + index) = make_float2(first, second);
  }
};

// Turn an accumulator into a result: bias, activation, residual, conversion, store. Columns from N on are skipped.
template <int N, class Activation, bool HAS_RESIDUAL, class Store>
struct Epilogue {
  const float* bias;      // [N]
  const float* residual;  // [M, N]
  void* out;              // [M, N]

  __device__ float apply(float acc, int row, int column) const {
    const float value = Activation::of(acc + bias[column]);
    return HAS_RESIDUAL ? value + residual[static_cast<long long>(row) * N + column] : value;
  }
  __device__ void store(float acc, int row, int column) const {
    if (column < N) Store::store(out, static_cast<long long>(row) * N + column, apply(acc, row, column));
  }
  // Store an even column and the next. With N odd a pair may be misaligned or straddle two rows: store one by one.
  __device__ void store_pair(float first, float second, int row, int column) const {
    if (N % 2 == 0) {
      if (column < N)
        Store::store_pair(out, static_cast<long long>(row) * N + column, apply(first, row, column),
                          apply(second, row, column + 1));
    } else {
      store(first, row, column);
      store(second, row, column + 1);
    }
  }
};

// The tiling of `linear`: BLOCK_M × BLOCK_N of out a block, WARPS_M × WARPS_N warps, STAGES k tiles in shared memory.
template <int BLOCK_M_, int BLOCK_N_, int WARPS_M_, int WARPS_N_, int STAGES_>
struct Tile {
  static constexpr int BLOCK_M = BLOCK_M_, BLOCK_N = BLOCK_N_, WARPS_N = WARPS_N_, STAGES = STAGES_;
  static constexpr int THREADS = 32 * WARPS_M_ * WARPS_N_;
  static constexpr int WARP_M = BLOCK_M / WARPS_M_, WARP_N = BLOCK_N / WARPS_N_;
};

constexpr int K_TILE_BYTES = 64, CHUNK_BYTES = 16, CHUNKS = K_TILE_BYTES / CHUNK_BYTES;

// XOR swizzle: the byte offset in a tile of chunk `chunk` of row `row`. See the drawing above.
__device__ inline int swizzle(int row, int chunk) {
  return row * K_TILE_BYTES + (chunk ^ (row >> 1 & 3)) * CHUNK_BYTES;
}

// Copies k tiles of ROWS rows of a matrix [limit, ROW_BYTES] from row `first_row` on to shared memory. CHUNKS threads
// share a row, so a thread copies the same chunk of rows r, r + ROW_STEP, …; as ROW_STEP is a multiple of 8, their
// swizzle is the same, and one offset a thread is enough. Rows from `limit` on are clamped to the last, whose
// results the epilogue does not store; bytes beyond a row's end are zeros, which add nothing to a dot product.
template <int ROWS, int ROW_BYTES, int THREADS>
struct TileLoader {
  static constexpr int COPIES = ROWS * CHUNKS / THREADS, ROW_STEP = THREADS / CHUNKS;
  static_assert(ROWS * CHUNKS % THREADS == 0 && ROW_STEP % 8 == 0, "all rows of a thread must have the same swizzle");
  const unsigned char* source[COPIES];
  int offset;

  __device__ TileLoader(const void* matrix, int first_row, int limit) {
    const int row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
    offset = swizzle(row, chunk);
#pragma unroll
    for (int i = 0; i < COPIES; ++i) {
      const int unclamped = first_row + row + i * ROW_STEP, clamped = unclamped < limit ? unclamped : limit - 1;
      source[i] = static_cast<const unsigned char*>(matrix) + static_cast<long long>(clamped) * ROW_BYTES +
                  chunk * CHUNK_BYTES;
    }
  }

  // Start to copy a k tile; the caller commits the group.
  __device__ void load_async(unsigned char* tile, int k_tile) const {
    const int k_offset = k_tile * K_TILE_BYTES;
    const int left = ROW_BYTES - k_offset - static_cast<int>(threadIdx.x % CHUNKS) * CHUNK_BYTES;
#pragma unroll
    for (int i = 0; i < COPIES; ++i) {
      unsigned char* target = tile + offset + i * ROW_STEP * K_TILE_BYTES;
      if (ROW_BYTES % K_TILE_BYTES == 0)
        cp_async(target, source[i] + k_offset);
      else  // In the last k tile: an address within the row, and how many of the 16 bytes are in it.
        cp_async(target, source[i] + (left > 0 ? k_offset : 0),
                 left >= CHUNK_BYTES ? CHUNK_BYTES : left > 0 ? left : 0);
    }
  }
};

// x [M, K] · w [N, K]ᵀ, one block's tile of it, on tensor cores. A row's K elements must be a multiple of 16 bytes.
template <class DTypeTraits, class Tile, int K, int N, class Epilogue>
__device__ void gemm_tile(const void* x, const void* w, const Epilogue& epilogue, int M, unsigned char* shared) {
  constexpr int ROW_BYTES = K * DTypeTraits::bytes, K_TILES = (ROW_BYTES + K_TILE_BYTES - 1) / K_TILE_BYTES;
  constexpr int X_TILE_BYTES = Tile::BLOCK_M * K_TILE_BYTES, W_TILE_BYTES = Tile::BLOCK_N * K_TILE_BYTES;
  constexpr int WARP_MMA_M = Tile::WARP_M / 16, WARP_MMA_N = Tile::WARP_N / 8;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int block_row = blockIdx.x * Tile::BLOCK_M, block_column = blockIdx.y * Tile::BLOCK_N;
  const int warp_row = warp / Tile::WARPS_N * Tile::WARP_M;
  const int warp_column = warp % Tile::WARPS_N * Tile::WARP_N;

  const TileLoader<Tile::BLOCK_M, ROW_BYTES, Tile::THREADS> x_loader(x, block_row, M);
  const TileLoader<Tile::BLOCK_N, ROW_BYTES, Tile::THREADS> w_loader(w, block_column, N);
  // Beyond the last k tile the group is empty: so wait_group counts the same in every iteration.
  const auto load_k_tile = [&](int k_tile) {
    if (k_tile < K_TILES) {
      unsigned char* stage = shared + k_tile % Tile::STAGES * (X_TILE_BYTES + W_TILE_BYTES);
      x_loader.load_async(stage, k_tile);
      w_loader.load_async(stage + X_TILE_BYTES, k_tile);
    }
    commit_group();
  };

  float acc[WARP_MMA_M][WARP_MMA_N][4] = {};
#pragma unroll
  for (int k_tile = 0; k_tile < Tile::STAGES - 1; ++k_tile) load_k_tile(k_tile);
#pragma unroll 1  // Unrolling the few k tiles of a small K would need more registers than a thread has.
  for (int k_tile = 0; k_tile < K_TILES; ++k_tile) {
    wait_group<Tile::STAGES - 2>();
    __syncthreads();  // All threads' copies of this k tile have landed, and all warps have read the stage filled next.
    load_k_tile(k_tile + Tile::STAGES - 1);
    const unsigned char* x_tile = shared + k_tile % Tile::STAGES * (X_TILE_BYTES + W_TILE_BYTES);
    const unsigned char* w_tile = x_tile + X_TILE_BYTES;
#pragma unroll
    for (int k_step = 0; k_step < CHUNKS / 2; ++k_step) {  // two chunks, 32 bytes: the K of one mma
      unsigned a[WARP_MMA_M][4], b[WARP_MMA_N / 2][4];
#pragma unroll
      for (int i = 0; i < WARP_MMA_M; ++i) {
        // A fragment: matrices 0 and 1 are rows 0-7 and 8-15 of the first chunk, 2 and 3 those of the second.
        ldmatrix_x4(a[i], x_tile + swizzle(warp_row + i * 16 + lane % 16, k_step * 2 + lane / 16));
#pragma unroll
        for (int e = 0; e < 4; ++e) a[i][e] = DTypeTraits::to_operand(a[i][e]);
      }
#pragma unroll
      for (int j = 0; j < WARP_MMA_N / 2; ++j) {
        // Two B fragments: matrices 0 and 1 are both chunks of columns 0-7 (b0, b1), 2 and 3 those of columns 8-15.
        ldmatrix_x4(b[j], w_tile + swizzle(warp_column + j * 16 + lane % 8 + lane / 16 * 8, k_step * 2 + lane / 8 % 2));
#pragma unroll
        for (int e = 0; e < 4; ++e) b[j][e] = DTypeTraits::to_operand(b[j][e]);
      }
#pragma unroll
      for (int i = 0; i < WARP_MMA_M; ++i)
#pragma unroll
        for (int j = 0; j < WARP_MMA_N; ++j)
          DTypeTraits::mma(acc[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
  }
#pragma unroll
  for (int i = 0; i < WARP_MMA_M; ++i)
#pragma unroll
    for (int j = 0; j < WARP_MMA_N; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // C fragment: rows lane / 4 and 8 below, two neighbouring columns each
        const int row = block_row + warp_row + i * 16 + half * 8 + lane / 4;
        const int column = block_column + warp_column + j * 8 + lane % 4 * 2;
        if (row < M) epilogue.store_pair(acc[i][j][half * 2], acc[i][j][half * 2 + 1], row, column);
      }
}

// The kernel. Shared memory: STAGES · (BLOCK_M + BLOCK_N) · K_TILE_BYTES.
template <class DTypeTraits, class Tile, int K, int N, class Activation, bool HAS_RESIDUAL, class Store>
__device__ void linear(const void* x, const void* w, const void* bias, const void* residual, void* out, int M,
                       void* shared) {
  const Epilogue<N, Activation, HAS_RESIDUAL, Store> epilogue{static_cast<const float*>(bias),
                                                              static_cast<const float*>(residual), out};
  gemm_tile<DTypeTraits, Tile, K, N>(x, w, epilogue, M, static_cast<unsigned char*>(shared));
}

// Convert 16 bytes of 16-bit elements to eight float32.
template <class DTypeTraits>
__device__ void unpack8(float (&values)[8], const uint4& packed) {
  const unsigned pairs[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = DTypeTraits::low(pairs[i]);
    values[2 * i + 1] = DTypeTraits::high(pairs[i]);
  }
}

// The kernel for M ≤ ROWS: a warp computes COLUMNS columns of all rows. K must be a multiple of 8. Rows from M on and
// columns from N on are clamped to the last one, and not stored.
template <class DTypeTraits, int ROWS, int COLUMNS, int WARPS, int K, int N, class Activation, bool HAS_RESIDUAL,
          class Store>
__device__ void skinny_gemm(const void* x, const void* w, const void* bias, const void* residual, void* out, int M) {
  const Epilogue<N, Activation, HAS_RESIDUAL, Store> epilogue{static_cast<const float*>(bias),
                                                              static_cast<const float*>(residual), out};
  const int lane = threadIdx.x % 32;
  const int first_column = (blockIdx.x * WARPS + threadIdx.x / 32) * COLUMNS;
  const uint4* x_chunks = static_cast<const uint4*>(x);
  const uint4* w_chunks = static_cast<const uint4*>(w);
  constexpr int ROW_CHUNKS = K / 8;
  float acc[ROWS][COLUMNS] = {};
#pragma unroll 4
  for (int chunk = lane; chunk < ROW_CHUNKS; chunk += 32) {
    uint4 w_packed[COLUMNS];
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
      const int column = first_column + c < N ? first_column + c : N - 1;
      w_packed[c] = w_chunks[static_cast<long long>(column) * ROW_CHUNKS + chunk];
    }
    float w_values[COLUMNS][8];
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) unpack8<DTypeTraits>(w_values[c], w_packed[c]);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float x_values[8];
      unpack8<DTypeTraits>(x_values, x_chunks[static_cast<long long>(r < M ? r : M - 1) * ROW_CHUNKS + chunk]);
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
        for (int e = 0; e < 8; ++e) acc[r][c] += x_values[e] * w_values[c][e];
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
      // Butterfly reduction over the warp: every lane has the sum, and a different lane stores each result.
#pragma unroll
      for (int mask = 16; mask > 0; mask /= 2) acc[r][c] += shfl_xor(acc[r][c], mask);
      if (lane == (r * COLUMNS + c) % 32 && r < M) epilogue.store(acc[r][c], r, first_column + c);
    }
}

}  // namespace gpt_frontend
