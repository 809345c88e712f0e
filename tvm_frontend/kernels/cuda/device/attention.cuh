// Causal attention without a T × T matrix: blocks of 64 queries go through the keys 64 at a time, and keep for each
// query the largest score so far, the sum of the exponentials and the sum of values (online softmax, M. Milakov and
// N. Gimelshein, https://arxiv.org/abs/1805.02867; by blocks in registers, T. Dao et al., https://arxiv.org/abs/2205.14135).

namespace gpt_frontend {

constexpr int attention_rows = 64;     // queries a block, and keys at a time
constexpr int attention_threads = 128;  // a warp has 16 of the queries

// Rows of one head: row i begins `stride` numbers after row i - 1.
struct Rows {
  const unsigned short* first;
  long long stride;
};

// Rows lie 16 bytes further apart than they are long: eight chunks below one another are then in eight banks.
template <int hs>
struct Padded {
  static constexpr int row_bytes = hs * 2 + 16, bytes = attention_rows * row_bytes, chunks = hs / 8;

  // Begin to copy 64 rows from `first` on; beyond `limit` the last row again.
  static __device__ void copy(unsigned char* to, const Rows& rows, int first, int limit) {
    static_assert(attention_rows * chunks % attention_threads == 0, "all threads copy the same number of chunks");
#pragma unroll
    for (int i = 0; i < attention_rows * chunks / attention_threads; ++i) {
      const int at = i * attention_threads + threadIdx.x, row = at / chunks, chunk = at % chunks;
      const int source = first + row < limit ? first + row : limit - 1;
      copy_async(to + row * row_bytes + chunk * 16, rows.first + source * rows.stride + chunk * 8);
    }
  }
};

// The largest, or the sum, over the four lanes that share a row of a 16 × 8 result.
__device__ inline float largest_of_row(float x) {
  x = fmaxf(x, from_lane_xor(x, 1));
  return fmaxf(x, from_lane_xor(x, 2));
}

__device__ inline float sum_of_row(float x) {
  x += from_lane_xor(x, 1);
  return x + from_lane_xor(x, 2);
}

// out [T, hs] of one head: query t sees the keys 0 … pos + t. scale: of scores, times log2 e. The last blocks have the
// most keys, and begin first. Shared memory: 4 · Padded<hs>::bytes.
template <class Number, int hs>
__device__ void attend(const Rows& queries, const Rows& keys, const Rows& values, unsigned short* out,
                       long long out_stride, int T, int pos, float scale, unsigned char* shared) {
  using Block = Padded<hs>;
  constexpr int steps = hs / 16, across = attention_rows / 8, out_across = hs / 8;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_query = (gridDim.x - 1 - blockIdx.x) * attention_rows;
  const int last_query = first_query + attention_rows < T ? first_query + attention_rows : T;
  const int seen = pos + last_query;  // keys that the last query sees
  const int blocks = (seen + attention_rows - 1) / attention_rows;
  const int row = first_query + warp * 16 + lane / 4;  // and the one 8 below

  const auto stage_of = [&](int block) { return shared + block % 2 * 2 * Block::bytes; };
  const auto begin_block = [&](int block) {
    if (block < blocks) {
      Block::copy(stage_of(block), keys, block * attention_rows, seen);
      Block::copy(stage_of(block) + Block::bytes, values, block * attention_rows, seen);
    }
    close_group();
  };

  // The queries go through the second stage into registers.
  Block::copy(stage_of(1), queries, first_query, T);
  close_group();
  begin_block(0);
  wait_for_groups<1>();
  __syncthreads();
  unsigned q[steps][4];
#pragma unroll
  for (int step = 0; step < steps; ++step)
    load_matrices(q[step], stage_of(1) + (warp * 16 + lane % 16) * Block::row_bytes + (step * 2 + lane / 16) * 16);
  __syncthreads();

  float sums[out_across][4] = {}, largest[2] = {-INFINITY, -INFINITY}, total[2] = {};
  for (int block = 0; block < blocks; ++block) {
    begin_block(block + 1);
    wait_for_groups<1>();
    __syncthreads();
    const unsigned char* k_stage = stage_of(block);
    const unsigned char* v_stage = k_stage + Block::bytes;
    float scores[across][4] = {};
#pragma unroll
    for (int step = 0; step < steps; ++step)
#pragma unroll
      for (int j = 0; j < across / 2; ++j) {
        unsigned k[4];
        load_matrices(k, k_stage + (j * 16 + lane % 8 + lane / 16 * 8) * Block::row_bytes +
                             (step * 2 + lane / 8 % 2) * 16);
        Number::multiply_add(scores[2 * j], q[step], k[0], k[1]);
        Number::multiply_add(scores[2 * j + 1], q[step], k[2], k[3]);
      }
    if ((block + 1) * attention_rows > pos + first_query + warp * 16 + 1) {  // some query does not see some key
#pragma unroll
      for (int j = 0; j < across; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (block * attention_rows + j * 8 + lane % 4 * 2 + e % 2 > pos + row + e / 2 * 8) scores[j][e] = -INFINITY;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = largest[half];
#pragma unroll
      for (int j = 0; j < across; ++j) most = fmaxf(most, fmaxf(scores[j][half * 2], scores[j][half * 2 + 1]));
      most = largest_of_row(most);  // finite: key 0 is seen by every query
      const float shrink = power_of_two((largest[half] - most) * scale);
      largest[half] = most;
      total[half] *= shrink;
#pragma unroll
      for (int j = 0; j < across; ++j)
#pragma unroll
        for (int e = half * 2; e < half * 2 + 2; ++e) {
          scores[j][e] = power_of_two((scores[j][e] - most) * scale);
          total[half] += scores[j][e];
        }
#pragma unroll
      for (int j = 0; j < out_across; ++j) {
        sums[j][half * 2] *= shrink;
        sums[j][half * 2 + 1] *= shrink;
      }
    }
#pragma unroll
    for (int step = 0; step < across / 2; ++step) {  // 16 keys
      // What a lane has of two results side by side is what it gives of a 16 × 16 factor.
      const unsigned p[4] = {Number::pack(scores[2 * step][0], scores[2 * step][1]),
                             Number::pack(scores[2 * step][2], scores[2 * step][3]),
                             Number::pack(scores[2 * step + 1][0], scores[2 * step + 1][1]),
                             Number::pack(scores[2 * step + 1][2], scores[2 * step + 1][3])};
#pragma unroll
      for (int j = 0; j < out_across / 2; ++j) {
        unsigned v[4];
        load_matrices_transposed(v, v_stage + (step * 16 + lane % 16) * Block::row_bytes + (j * 2 + lane / 16) * 16);
        Number::multiply_add(sums[2 * j], p, v[0], v[1]);
        Number::multiply_add(sums[2 * j + 1], p, v[2], v[3]);
      }
    }
    __syncthreads();  // before the stage is written again
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float inverse = 1.0f / sum_of_row(total[half]);
    if (row + half * 8 < T) {
#pragma unroll
      for (int j = 0; j < out_across; ++j)
        *reinterpret_cast<unsigned*>(out + (row + half * 8) * out_stride + j * 8 + lane % 4 * 2) =
            Number::pack(sums[j][half * 2] * inverse, sums[j][half * 2 + 1] * inverse);
    }
  }
}

// qkv [B, T, 3 · nh · hs] → out [B, T, nh · hs]. blockIdx: of queries, head, sequence.
template <class Number, int nh, int hs>
__device__ void causal_attention(const void* qkv, void* out, int T, float scale, void* shared) {
  constexpr int C = nh * hs;
  const unsigned short* own = static_cast<const unsigned short*>(qkv) +
                              static_cast<long long>(blockIdx.z) * T * 3 * C + blockIdx.y * hs;
  unsigned short* place = static_cast<unsigned short*>(out) + static_cast<long long>(blockIdx.z) * T * C +
                          blockIdx.y * hs;
  attend<Number, hs>({own, 3 * C}, {own + C, 3 * C}, {own + 2 * C, 3 * C}, place, C, T, 0, scale,
                     static_cast<unsigned char*>(shared));
}

}  // namespace gpt_frontend
