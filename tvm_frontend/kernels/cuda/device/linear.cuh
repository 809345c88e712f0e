// Linear layers: out = activation(x · W + bias) [+ addend], W kept as [N, K] so that both factors are read along K.

namespace gpt_frontend {

struct Identity {
  static __device__ float of(float x) { return x; }
};

struct Relu {
  static __device__ float of(float x) { return x > 0.0f ? x : 0.0f; }
};

// x · sigmoid(2u), u = √(2/π) (x + 0.044715 x³), which is 0.5 x (1 + tanh u).
struct GeluTanh {
  static __device__ float of(float x) {
    const float minus_2u_log2e = x * (-2.302208198f - 0.1029432397f * x * x);
    return x / (1.0f + power_of_two(minus_2u_log2e));
  }
};

struct Gelu {
  static __device__ float of(float x) { return 0.5f * x * (1.0f + erff(x * 0.7071067812f)); }
};

// How results are stored: two neighbours of a row at once where both are there and lie at a multiple of their size.
template <class Number>
struct Narrow {
  static __device__ void store(void* out, long long at, float value) {
    static_cast<unsigned short*>(out)[at] = static_cast<unsigned short>(Number::pack(value, 0.0f));
  }
  static __device__ void store_pair(void* out, long long at, float first, float second) {
    *reinterpret_cast<unsigned*>(static_cast<unsigned short*>(out) + at) = Number::pack(first, second);
  }
};

struct Wide {
  static __device__ void store(void* out, long long at, float value) { static_cast<float*>(out)[at] = value; }
  static __device__ void store_pair(void* out, long long at, float first, float second) {
    *reinterpret_cast<float2*>(static_cast<float*>(out) + at) = make_float2(first, second);
  }
};

// What is done with a sum before it is stored.
template <int N, class Activation, bool with_addend, class Out>
struct Epilogue {
  const float* bias;    // [N]
  const float* addend;  // [M, N]
  void* out;            // [M, N]

  __device__ float result(float sum, int row, int column) const {
    const float value = Activation::of(sum + bias[column]);
    return with_addend ? value + addend[static_cast<long long>(row) * N + column] : value;
  }
  __device__ void finish(float sum, int row, int column) const {
    if (column < N) Out::store(out, static_cast<long long>(row) * N + column, result(sum, row, column));
  }
  // Of an even column and the next.
  __device__ void finish_pair(float first, float second, int row, int column) const {
    if (N % 2 == 0) {
      if (column < N)
        Out::store_pair(out, static_cast<long long>(row) * N + column, result(first, row, column),
                        result(second, row, column + 1));
    } else {
      finish(first, row, column);
      finish(second, row, column + 1);
    }
  }
};

// A block's share of the product: `rows` × `columns` of it, by `warps_down` × `warps_across` warps, from slices of 64
// bytes along K, of which `stages` are in shared memory at a time.
template <int rows_, int columns_, int warps_down_, int warps_across_, int stages_>
struct Tile {
  static constexpr int rows = rows_, columns = columns_, warps_across = warps_across_, stages = stages_;
  static constexpr int threads = 32 * warps_down_ * warps_across_;
  static constexpr int warp_rows = rows / warps_down_, warp_columns = columns / warps_across_;
};

constexpr int slice_bytes = 64, chunk_bytes = 16, chunks = slice_bytes / chunk_bytes;

// Where a chunk of a row of a slice lies. Eight rows of one chunk, which are read together, are in eight banks.
__device__ inline int place_in_slice(int row, int chunk) {
  return row * slice_bytes + (chunk ^ (row >> 1 & 3)) * chunk_bytes;
}

// A thread's share of copying slices of `rows` rows of a matrix [limit, row_bytes], from row `first_row` on: one chunk of
// each of its rows. Rows beyond the last are the last again, bytes beyond a row's end zeros.
template <int rows, int row_bytes, int threads>
struct Slices {
  static constexpr int each = rows * chunks / threads, apart = threads / chunks;  // its rows, and how far they are apart
  static_assert(rows * chunks % threads == 0 && apart % 8 == 0, "else its chunks lie in different places of their rows");
  const unsigned char* from[each];
  int place;

  __device__ Slices(const void* matrix, int first_row, int limit) {
    const int row = threadIdx.x / chunks, chunk = threadIdx.x % chunks;
    place = place_in_slice(row, chunk);
#pragma unroll
    for (int i = 0; i < each; ++i) {
      const int own = first_row + row + i * apart, source = own < limit ? own : limit - 1;
      from[i] = static_cast<const unsigned char*>(matrix) + static_cast<long long>(source) * row_bytes +
                chunk * chunk_bytes;
    }
  }

  // Begin to copy a slice.
  __device__ void begin(unsigned char* to, int slice) const {
    const int offset = slice * slice_bytes;
    const int left = row_bytes - offset - static_cast<int>(threadIdx.x % chunks) * chunk_bytes;
#pragma unroll
    for (int i = 0; i < each; ++i) {
      unsigned char* own = to + place + i * apart * slice_bytes;
      if (row_bytes % slice_bytes == 0)
        copy_async(own, from[i] + offset);
      else
        copy_async(own, from[i] + (left > 0 ? offset : 0), left >= chunk_bytes ? chunk_bytes : left > 0 ? left : 0);
    }
  }
};

// x [M, K] · w [N, K]ᵀ by tensor cores. K · bytes a number must be a multiple of 16. blockIdx.x: which rows of x, so
// that blocks that run together share w; blockIdx.y: which of w.
template <class Number, class Tile, int K, int N, class Finish>
__device__ void multiply_tiles(const void* x, const void* w, const Finish& epilogue, int M, unsigned char* shared) {
  constexpr int row_bytes = K * Number::bytes, slices = (row_bytes + slice_bytes - 1) / slice_bytes;
  constexpr int x_bytes = Tile::rows * slice_bytes, w_bytes = Tile::columns * slice_bytes;
  constexpr int down = Tile::warp_rows / 16, across = Tile::warp_columns / 8;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_row = blockIdx.x * Tile::rows, first_column = blockIdx.y * Tile::columns;
  const int warp_row = warp / Tile::warps_across * Tile::warp_rows;
  const int warp_column = warp % Tile::warps_across * Tile::warp_columns;

  const Slices<Tile::rows, row_bytes, Tile::threads> x_slices(x, first_row, M);
  const Slices<Tile::columns, row_bytes, Tile::threads> w_slices(w, first_column, N);
  const auto begin_slice = [&](int slice) {
    if (slice < slices) {
      unsigned char* stage = shared + slice % Tile::stages * (x_bytes + w_bytes);
      x_slices.begin(stage, slice);
      w_slices.begin(stage + x_bytes, slice);
    }
    close_group();
  };

  float sums[down][across][4] = {};
#pragma unroll
  for (int slice = 0; slice < Tile::stages - 1; ++slice) begin_slice(slice);
#pragma unroll 1  // or the few slices of a small K would take more registers than there are
  for (int slice = 0; slice < slices; ++slice) {
    wait_for_groups<Tile::stages - 2>();
    __syncthreads();  // the slice is there for all, and the stage before it has been used by all
    begin_slice(slice + Tile::stages - 1);
    const unsigned char* x_stage = shared + slice % Tile::stages * (x_bytes + w_bytes);
    const unsigned char* w_stage = x_stage + x_bytes;
#pragma unroll
    for (int step = 0; step < chunks / 2; ++step) {  // 32 bytes along K
      unsigned a[down][4], b[across / 2][4];
#pragma unroll
      for (int i = 0; i < down; ++i) {
        load_matrices(a[i], x_stage + place_in_slice(warp_row + i * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
        for (int e = 0; e < 4; ++e) a[i][e] = Number::operand(a[i][e]);
      }
#pragma unroll
      for (int j = 0; j < across / 2; ++j) {
        load_matrices(b[j], w_stage + place_in_slice(warp_column + j * 16 + lane % 8 + lane / 16 * 8,
                                                     step * 2 + lane / 8 % 2));
#pragma unroll
        for (int e = 0; e < 4; ++e) b[j][e] = Number::operand(b[j][e]);
      }
#pragma unroll
      for (int i = 0; i < down; ++i)
#pragma unroll
        for (int j = 0; j < across; ++j)
          Number::multiply_add(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
  }
#pragma unroll
  for (int i = 0; i < down; ++i)
#pragma unroll
    for (int j = 0; j < across; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_row + warp_row + i * 16 + half * 8 + lane / 4;
        const int column = first_column + warp_column + j * 8 + lane % 4 * 2;
        if (row < M) epilogue.finish_pair(sums[i][j][half * 2], sums[i][j][half * 2 + 1], row, column);
      }
}

template <class Number, class Tile, int K, int N, class Activation, bool with_addend, class Out>
__device__ void linear(const void* x, const void* w, const void* bias, const void* addend, void* out, int M,
                       void* shared) {
  const Epilogue<N, Activation, with_addend, Out> epilogue{static_cast<const float*>(bias),
                                                           static_cast<const float*>(addend), out};
  multiply_tiles<Number, Tile, K, N>(x, w, epilogue, M, static_cast<unsigned char*>(shared));
}

// 16 bytes of 16-bit numbers as eight float32.
template <class Number>
__device__ void widen(float (&to)[8], const uint4& from) {
  const unsigned words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    to[2 * i] = Number::first(words[i]);
    to[2 * i + 1] = Number::second(words[i]);
  }
}

// The same for few rows, which is bound by reading w once: a warp makes `columns` columns of up to `rows` rows, each
// lane along K, 16 bytes at a time. K must be a multiple of 8. blockIdx.x: which columns.
template <class Number, int rows, int columns, int warps, int K, int N, class Activation, bool with_addend, class Out>
__device__ void linear_of_few_rows(const void* x, const void* w, const void* bias, const void* addend, void* out,
                                   int M) {
  const Epilogue<N, Activation, with_addend, Out> epilogue{static_cast<const float*>(bias),
                                                           static_cast<const float*>(addend), out};
  const int lane = threadIdx.x % 32;
  const int first_column = (blockIdx.x * warps + threadIdx.x / 32) * columns;
  const uint4* x_chunks = static_cast<const uint4*>(x);
  const uint4* w_chunks = static_cast<const uint4*>(w);
  constexpr int row_chunks = K / 8;
  float sums[rows][columns] = {};
#pragma unroll 4
  for (int at = lane; at < row_chunks; at += 32) {
    uint4 weights[columns];
#pragma unroll
    for (int c = 0; c < columns; ++c) {
      const int column = first_column + c < N ? first_column + c : N - 1;
      weights[c] = w_chunks[static_cast<long long>(column) * row_chunks + at];
    }
    float wide[columns][8];
#pragma unroll
    for (int c = 0; c < columns; ++c) widen<Number>(wide[c], weights[c]);
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      float values[8];
      widen<Number>(values, x_chunks[static_cast<long long>(r < M ? r : M - 1) * row_chunks + at]);
#pragma unroll
      for (int c = 0; c < columns; ++c)
#pragma unroll
        for (int e = 0; e < 8; ++e) sums[r][c] += values[e] * wide[c][e];
    }
  }
#pragma unroll
  for (int r = 0; r < rows; ++r)
#pragma unroll
    for (int c = 0; c < columns; ++c) {
#pragma unroll
      for (int mask = 16; mask > 0; mask /= 2) sums[r][c] += from_lane_xor(sums[r][c], mask);
      if (lane == (r * columns + c) % 32 && r < M) epilogue.finish(sums[r][c], r, first_column + c);
    }
}

}  // namespace gpt_frontend
