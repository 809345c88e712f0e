// Attention over a KV cache: keys and values [B, nh, length, hs], 16-bit elements, of which sequence b has filled the
// first pos[b] rows.
//
// Several new tokens: `append_kv` copies their keys and values into the cache, a block a token; then `append_attention`
// is flash attention of the new queries over the cache (loop nest in attention.cuh).
//
// One new token (decode) is split-KV attention, also called flash decoding, bound by reading the cache once:
//
//   decode_split_kv
//   blockIdx.y, blockIdx.z      heads, sequences
//   blockIdx.x                  splits of SPLIT_KEYS keys     enough blocks to fill the GPU at B = 1
//   warp (4)                    32 of the split's keys        scores: shared memory
//   KEYS_AT_ONCE                keys of a warp, side by side  a key's row: LANES lanes, 16 bytes each
//
//   merge_states
//   blockIdx.x, blockIdx.y      heads, sequences; a thread has one of the hs columns
//   split                       the partial states of a head, each (out_acc [hs], row_max, row_sum)

namespace gpt_frontend {

// Copy keys and values of qkv [B, T, 3 · nh · hs] to rows pos[b] … pos[b] + T - 1 of the cache. blockIdx: t, b.
template <int nh, int hs, int length, int THREADS>
__device__ void append_kv(const void* qkv, const void* pos, void* keys, void* values, int T) {
  constexpr int C = nh * hs, CHUNKS = C / 8, HEAD_CHUNKS = hs / 8;  // of 16 bytes
  const int t = blockIdx.x, b = blockIdx.y;
  const uint4* source = static_cast<const uint4*>(qkv) + (static_cast<long long>(b) * T + t) * 3 * CHUNKS + CHUNKS;
  const long long slot = static_cast<const long long*>(pos)[b] + t;
  for (int index = threadIdx.x; index < 2 * CHUNKS; index += THREADS) {
    const int chunk = index % CHUNKS;
    const long long row = (static_cast<long long>(b) * nh + chunk / HEAD_CHUNKS) * length + slot;
    static_cast<uint4*>(index < CHUNKS ? keys : values)[row * HEAD_CHUNKS + chunk % HEAD_CHUNKS] = source[index];
  }
}

// Attend from T new tokens, whose keys and values are in the cache already. blockIdx: query block, head, sequence.
template <class DTypeTraits, int nh, int hs, int length>
__device__ void append_attention(const void* qkv, const void* pos, const void* keys, const void* values, void* out,
                                 int T, float scale, void* shared) {
  constexpr int C = nh * hs;
  const int b = blockIdx.z, h = blockIdx.y;
  const long long head = (static_cast<long long>(b) * nh + h) * length * hs;
  flash_attention<DTypeTraits, hs>(
      {static_cast<const unsigned short*>(qkv) + static_cast<long long>(b) * T * 3 * C + h * hs, 3 * C},
      {static_cast<const unsigned short*>(keys) + head, hs}, {static_cast<const unsigned short*>(values) + head, hs},
      static_cast<unsigned short*>(out) + static_cast<long long>(b) * T * C + h * hs, C, T,
      static_cast<int>(static_cast<const long long*>(pos)[b]), scale, static_cast<unsigned char*>(shared));
}

constexpr int SPLIT_KEYS = 128, SPLIT_THREADS = 128;

// The smallest power of two that is at least n.
__device__ constexpr int next_pow2(int n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

// Attend from one new token of each sequence to SPLIT_KEYS keys of a head, and write its state: the unnormalised
// output, the largest score and the sum of the exponentials, float32 [B, nh, gridDim.x, hs + 2]. The block whose split
// holds the new token's key also writes its key and value to the cache; splits beyond it return at once. blockIdx:
// split, head, sequence. Shared memory: (SPLIT_KEYS + SPLIT_THREADS / 32 · hs) · 4 bytes.
template <class DTypeTraits, int nh, int hs, int length>
__device__ void decode_split_kv(const void* qkv, const void* pos, void* keys, void* values, void* states, float scale,
                                void* shared) {
  // A key's row is shared by LANES lanes, a power of two so that they reduce by xor; those beyond CHUNKS read nothing.
  constexpr int C = nh * hs, CHUNKS = hs / 8, LANES = next_pow2(CHUNKS), WARPS = SPLIT_THREADS / 32;
  const int h = blockIdx.y, b = blockIdx.z, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int last_key = static_cast<int>(static_cast<const long long*>(pos)[b]);
  const int first_key = blockIdx.x * SPLIT_KEYS;
  if (first_key > last_key) return;
  const int chunk = lane % LANES;  // of a row, this lane's 16 bytes
  const bool has_chunk = chunk < CHUNKS;
  const uint4* new_row = static_cast<const uint4*>(qkv) + (static_cast<long long>(b) * 3 * C + h * hs) / 8 + chunk;
  const long long head = (static_cast<long long>(b) * nh + h) * length;
  float* scores = static_cast<float*>(shared);  // [SPLIT_KEYS]
  float* warp_out = scores + SPLIT_KEYS;        // [WARPS, hs]
  const uint4 zeros = make_uint4(0, 0, 0, 0);

  // Load this lane's chunk of key (qkv_part 1) or value (2) `i` of the split. The last row comes from qkv, and goes to
  // the cache on the way; rows beyond it are clamped to it.
  const auto load_chunk = [&](void* rows, int qkv_part, int i) {
    if (!has_chunk) return zeros;
    uint4* cached = static_cast<uint4*>(rows) + head * CHUNKS + chunk;
    const int key = first_key + i < last_key ? first_key + i : last_key;
    const uint4 row = key == last_key ? new_row[qkv_part * C / 8] : cached[static_cast<long long>(key) * CHUNKS];
    if (first_key + i == last_key) cached[static_cast<long long>(key) * CHUNKS] = row;
    return row;
  };

  float q[8];
  unpack8<DTypeTraits>(q, has_chunk ? new_row[0] : zeros);
  constexpr int KEYS_AT_ONCE = 32 / LANES;
  const int begin = warp * 32 + lane / LANES;
#pragma unroll 4
  for (int i = begin; i < (warp + 1) * 32; i += KEYS_AT_ONCE) {
    float k[8], score = 0.0f;
    unpack8<DTypeTraits>(k, load_chunk(keys, 1, i));
#pragma unroll
    for (int e = 0; e < 8; ++e) score += q[e] * k[e];
#pragma unroll
    for (int mask = LANES / 2; mask > 0; mask /= 2) score += shfl_xor(score, mask);
    if (chunk == 0) scores[i] = first_key + i <= last_key ? score : -INFINITY;
  }
  __syncthreads();
  // Each warp reduces all of the split's scores: that is cheaper than to exchange results through shared memory.
  float row_max = -INFINITY, row_sum = 0.0f;
#pragma unroll
  for (int i = lane; i < SPLIT_KEYS; i += 32) row_max = fmaxf(row_max, scores[i]);
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) row_max = fmaxf(row_max, shfl_xor(row_max, mask));
#pragma unroll
  for (int i = lane; i < SPLIT_KEYS; i += 32) row_sum += exp2_approx((scores[i] - row_max) * scale);
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) row_sum += shfl_xor(row_sum, mask);

  float out_acc[8] = {};
#pragma unroll 4
  for (int i = begin; i < (warp + 1) * 32; i += KEYS_AT_ONCE) {
    float v[8];
    unpack8<DTypeTraits>(v, load_chunk(values, 2, i));
    const float p = exp2_approx((scores[i] - row_max) * scale);
#pragma unroll
    for (int e = 0; e < 8; ++e) out_acc[e] += p * v[e];
  }
  // Add up over the keys of a warp, which differ in the lane's upper bits; then over the warps, through shared memory.
#pragma unroll
  for (int e = 0; e < 8; ++e) {
#pragma unroll
    for (int mask = LANES; mask < 32; mask *= 2) out_acc[e] += shfl_xor(out_acc[e], mask);
    if (lane < LANES && has_chunk) warp_out[warp * hs + chunk * 8 + e] = out_acc[e];
  }
  __syncthreads();
  float* state = static_cast<float*>(states) +
                 ((static_cast<long long>(b) * nh + h) * gridDim.x + blockIdx.x) * (hs + 2);
  for (int d = threadIdx.x; d < hs; d += SPLIT_THREADS) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += warp_out[w * hs + d];
    state[d] = sum;
  }
  if (threadIdx.x == 0) {
    state[hs] = row_max;
    state[hs + 1] = row_sum;
  }
}

// Merge a head's states to out [B, 1, nh · hs]: rescale each to the overall maximum, add up, normalise. max_splits:
// the states that there is room for in each head. blockIdx: head, sequence; one thread a column.
template <class DTypeTraits, int nh, int hs>
__device__ void merge_states(const void* states, const void* pos, void* out, int max_splits, float scale) {
  const int h = blockIdx.x, b = blockIdx.y, d = threadIdx.x;
  const int splits = static_cast<int>(static_cast<const long long*>(pos)[b]) / SPLIT_KEYS + 1;
  const float* head = static_cast<const float*>(states) + (static_cast<long long>(b) * nh + h) * max_splits * (hs + 2);
  float row_max = -INFINITY, row_sum = 0.0f, out_acc = 0.0f;
  for (int i = 0; i < splits; ++i) row_max = fmaxf(row_max, head[i * (hs + 2) + hs]);
  for (int i = 0; i < splits; ++i) {
    const float rescale = exp2_approx((head[i * (hs + 2) + hs] - row_max) * scale);
    row_sum += rescale * head[i * (hs + 2) + hs + 1];
    out_acc += rescale * head[i * (hs + 2) + d];
  }
  StoreHalf<DTypeTraits>::store(out, (static_cast<long long>(b) * nh + h) * hs + d, out_acc / row_sum);
}

}  // namespace gpt_frontend
