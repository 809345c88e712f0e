// Causal self-attention whose T × T scores are never written to memory (flash attention): online softmax over blocks of
// keys (M. Milakov and N. Gimelshein, https://arxiv.org/abs/1805.02867), with scores and accumulators in registers
// (T. Dao et al., https://arxiv.org/abs/2205.14135).
//
//   loop                        over                          what stays where
//   blockIdx.y, blockIdx.z      heads, sequences
//   blockIdx.x                  blocks of BLOCK_Q queries     q: A fragments, in registers for the whole kernel
//   warp (4)                    16 of the block's queries     row_max, row_sum, out_acc: registers, 4 lanes a query
//   kv_block                    BLOCK_KV keys up to the last  k, v: shared memory, two stages, filled by cp.async while
//                               visible one                   the stage before is used
//     S = q · kᵀ                hs / 16 · BLOCK_KV / 8 mma    score: accumulators (C fragments), in registers
//     online softmax            rows of S                     P = exp2(S - row_max) replaces S in its registers
//     out_acc += P · v          BLOCK_KV / 16 · hs / 8 mma    C fragments of P are the A fragments of this product
//
// Rows in shared memory are 16 bytes longer than hs elements. As hs is a multiple of 16, the row stride is an odd
// multiple of 16 bytes, so the eight rows that one ldmatrix matrix reads are in eight different groups of four banks.

namespace gpt_frontend {

constexpr int BLOCK_Q = 64, BLOCK_KV = 64;
constexpr int ATTENTION_THREADS = 128;  // four warps of 16 queries

// Rows of one head in global memory, 16-bit elements; row i begins `stride` elements after row i - 1.
struct HeadRows {
  const unsigned short* data;
  long long stride;
};

// A tile of BLOCK_KV (or BLOCK_Q) rows in shared memory, padded.
template <int hs>
struct PaddedTile {
  static constexpr int ROWS = BLOCK_KV, ROW_BYTES = hs * 2 + 16, BYTES = ROWS * ROW_BYTES, CHUNKS = hs / 8;

  // Start to copy ROWS rows from `first` on; those from `limit` on are clamped to the last.
  static __device__ void load_async(unsigned char* tile, const HeadRows& rows, int first, int limit) {
    static_assert(ROWS * CHUNKS % ATTENTION_THREADS == 0, "all threads copy the same number of chunks");
#pragma unroll
    for (int i = 0; i < ROWS * CHUNKS / ATTENTION_THREADS; ++i) {
      const int index = i * ATTENTION_THREADS + threadIdx.x, row = index / CHUNKS, chunk = index % CHUNKS;
      const int clamped = first + row < limit ? first + row : limit - 1;
      cp_async(tile + row * ROW_BYTES + chunk * 16, rows.data + clamped * rows.stride + chunk * 8);
    }
  }
};

// Reduce over the four lanes that share a row of a C fragment: lanes 4g … 4g + 3 differ in the two lowest bits.
__device__ inline float quad_max(float x) {
  x = fmaxf(x, shfl_xor(x, 1));
  return fmaxf(x, shfl_xor(x, 2));
}

__device__ inline float quad_sum(float x) {
  x += shfl_xor(x, 1);
  return x + shfl_xor(x, 2);
}

// out [T, hs] of one head: query t sees the keys 0 … pos + t. scale: the scores' factor, times log2 e, as exponentials
// are powers of two. The last query blocks have the most keys, so they start first: blockIdx.x counts from the end.
// Shared memory: 4 · PaddedTile<hs>::BYTES, two stages of a k tile and a v tile.
template <class DTypeTraits, int hs>
__device__ void flash_attention(const HeadRows& queries, const HeadRows& keys, const HeadRows& values,
                                unsigned short* out, long long out_stride, int T, int pos, float scale,
                                unsigned char* shared) {
  using Tile = PaddedTile<hs>;
  constexpr int K_STEPS = hs / 16, NUM_MMA_KV = BLOCK_KV / 8, NUM_MMA_D = hs / 8;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_query = (gridDim.x - 1 - blockIdx.x) * BLOCK_Q;
  const int last_query = first_query + BLOCK_Q < T ? first_query + BLOCK_Q : T;  // exclusive
  const int kv_length = pos + last_query;  // keys that the block's last query sees
  const int kv_blocks = (kv_length + BLOCK_KV - 1) / BLOCK_KV;
  const int row = first_query + warp * 16 + lane / 4;  // C fragment: this lane has queries `row` and `row + 8`

  const auto stage_of = [&](int kv_block) { return shared + kv_block % 2 * 2 * Tile::BYTES; };
  // Beyond the last block the group is empty, so that wait_group counts the same in every iteration.
  const auto load_kv_block = [&](int kv_block) {
    if (kv_block < kv_blocks) {
      Tile::load_async(stage_of(kv_block), keys, kv_block * BLOCK_KV, kv_length);
      Tile::load_async(stage_of(kv_block) + Tile::BYTES, values, kv_block * BLOCK_KV, kv_length);
    }
    commit_group();
  };

  // The queries pass through the second stage, while the first kv block is already loaded into the first.
  Tile::load_async(stage_of(1), queries, first_query, T);
  commit_group();
  load_kv_block(0);
  wait_group<1>();
  __syncthreads();
  unsigned q[K_STEPS][4];
#pragma unroll
  for (int k_step = 0; k_step < K_STEPS; ++k_step)
    // A fragment: matrices 0 and 1 are queries 0-7 and 8-15 of the first chunk of 8 elements, 2 and 3 of the second.
    ldmatrix_x4(q[k_step], stage_of(1) + (warp * 16 + lane % 16) * Tile::ROW_BYTES + (k_step * 2 + lane / 16) * 16);
  __syncthreads();

  float out_acc[NUM_MMA_D][4] = {}, row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {};
  for (int kv_block = 0; kv_block < kv_blocks; ++kv_block) {
    load_kv_block(kv_block + 1);
    wait_group<1>();
    __syncthreads();
    const unsigned char* k_tile = stage_of(kv_block);
    const unsigned char* v_tile = k_tile + Tile::BYTES;
    float score[NUM_MMA_KV][4] = {};
#pragma unroll
    for (int k_step = 0; k_step < K_STEPS; ++k_step)
#pragma unroll
      for (int j = 0; j < NUM_MMA_KV / 2; ++j) {
        // Two B fragments: matrices 0 and 1 are both chunks of keys 0-7 (b0, b1), 2 and 3 those of keys 8-15.
        unsigned k[4];
        ldmatrix_x4(k, k_tile + (j * 16 + lane % 8 + lane / 16 * 8) * Tile::ROW_BYTES +
                           (k_step * 2 + lane / 8 % 2) * 16);
        DTypeTraits::mma_m16n8k16(score[2 * j], q[k_step], k[0], k[1]);
        DTypeTraits::mma_m16n8k16(score[2 * j + 1], q[k_step], k[2], k[3]);
      }
    // Causal mask, only if this block has a key that the warp's first query does not see. C fragment: element e is in
    // column 2 (lane % 4) + e % 2, and e / 2 says which of the two rows.
    if ((kv_block + 1) * BLOCK_KV > pos + first_query + warp * 16 + 1) {
#pragma unroll
      for (int j = 0; j < NUM_MMA_KV; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (kv_block * BLOCK_KV + j * 8 + lane % 4 * 2 + e % 2 > pos + row + e / 2 * 8) score[j][e] = -INFINITY;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float new_max = row_max[half];
#pragma unroll
      for (int j = 0; j < NUM_MMA_KV; ++j) new_max = fmaxf(new_max, fmaxf(score[j][half * 2], score[j][half * 2 + 1]));
      new_max = quad_max(new_max);  // finite: every query sees key 0, which is in the first block
      const float rescale = exp2_approx((row_max[half] - new_max) * scale);
      row_max[half] = new_max;
      row_sum[half] *= rescale;  // of this lane's columns; the quad is summed once, at the end
#pragma unroll
      for (int j = 0; j < NUM_MMA_KV; ++j)
#pragma unroll
        for (int e = half * 2; e < half * 2 + 2; ++e) {
          score[j][e] = exp2_approx((score[j][e] - new_max) * scale);
          row_sum[half] += score[j][e];
        }
#pragma unroll
      for (int j = 0; j < NUM_MMA_D; ++j) {
        out_acc[j][half * 2] *= rescale;
        out_acc[j][half * 2 + 1] *= rescale;
      }
    }
#pragma unroll
    for (int k_step = 0; k_step < NUM_MMA_KV / 2; ++k_step) {  // 16 keys
      // Two neighbouring C fragments [16, 8] are one A fragment [16, 16]: each lane already holds its elements.
      const unsigned p[4] = {DTypeTraits::pack(score[2 * k_step][0], score[2 * k_step][1]),
                             DTypeTraits::pack(score[2 * k_step][2], score[2 * k_step][3]),
                             DTypeTraits::pack(score[2 * k_step + 1][0], score[2 * k_step + 1][1]),
                             DTypeTraits::pack(score[2 * k_step + 1][2], score[2 * k_step + 1][3])};
#pragma unroll
      for (int j = 0; j < NUM_MMA_D / 2; ++j) {
        // Two B fragments of v [keys, hs], transposed, as B is column-major: matrices 0 and 1 are keys 0-7 and
        // 8-15 (b0, b1) of the first chunk of 8 columns, 2 and 3 of the second.
        unsigned v[4];
        ldmatrix_x4_trans(v, v_tile + (k_step * 16 + lane % 16) * Tile::ROW_BYTES + (j * 2 + lane / 16) * 16);
        DTypeTraits::mma_m16n8k16(out_acc[2 * j], p, v[0], v[1]);
        DTypeTraits::mma_m16n8k16(out_acc[2 * j + 1], p, v[2], v[3]);
      }
    }
    __syncthreads();  // All warps have read this stage before it is filled again.
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float inverse = 1.0f / quad_sum(row_sum[half]);
    if (row + half * 8 < T) {
#pragma unroll
      for (int j = 0; j < NUM_MMA_D; ++j)
        *reinterpret_cast<unsigned*>(out + (row + half * 8) * out_stride + j * 8 + lane % 4 * 2) =
            DTypeTraits::pack(out_acc[j][half * 2] * inverse, out_acc[j][half * 2 + 1] * inverse);
    }
  }
}

// The kernel: qkv [B, T, 3 · nh · hs] → out [B, T, nh · hs]. blockIdx: query block, head, sequence.
template <class DTypeTraits, int nh, int hs>
__device__ void causal_attention(const void* qkv, void* out, int T, float scale, void* shared) {
  constexpr int C = nh * hs;
  const unsigned short* head = static_cast<const unsigned short*>(qkv) +
                               static_cast<long long>(blockIdx.z) * T * 3 * C + blockIdx.y * hs;
  unsigned short* head_out = static_cast<unsigned short*>(out) + static_cast<long long>(blockIdx.z) * T * C +
                             blockIdx.y * hs;
  flash_attention<DTypeTraits, hs>({head, 3 * C}, {head + C, 3 * C}, {head + 2 * C, 3 * C}, head_out, C, T, 0, scale,
                                   static_cast<unsigned char*>(shared));
}

}  // namespace gpt_frontend
