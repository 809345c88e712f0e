// Attention over a KV cache, keys and values [B, nh, length, hs], of which a sequence has filled pos[b] rows.

namespace gpt_frontend {

// The new rows of qkv [B, T, 3 · nh · hs] into the cache. blockIdx: t, b.
template <int nh, int hs, int length, int threads>
__device__ void append_rows(const void* qkv, const void* pos, void* keys, void* values, int T) {
  constexpr int C = nh * hs, chunks = C / 8, of_head = hs / 8;
  const int t = blockIdx.x, b = blockIdx.y;
  const uint4* from = static_cast<const uint4*>(qkv) + (static_cast<long long>(b) * T + t) * 3 * chunks + chunks;
  const long long place = static_cast<const long long*>(pos)[b] + t;
  for (int at = threadIdx.x; at < 2 * chunks; at += threads) {
    const int chunk = at % chunks;
    const long long row = (static_cast<long long>(b) * nh + chunk / of_head) * length + place;
    static_cast<uint4*>(at < chunks ? keys : values)[row * of_head + chunk % of_head] = from[at];
  }
}

// Several new rows, which are in the cache. blockIdx: of queries, head, sequence.
template <class Number, int nh, int hs, int length>
__device__ void attend_to_cache(const void* qkv, const void* pos, const void* keys, const void* values, void* out,
                                int T, float scale, void* shared) {
  constexpr int C = nh * hs;
  const int b = blockIdx.z, h = blockIdx.y;
  const long long cache = (static_cast<long long>(b) * nh + h) * length * hs;
  attend<Number, hs>({static_cast<const unsigned short*>(qkv) + static_cast<long long>(b) * T * 3 * C + h * hs, 3 * C},
                     {static_cast<const unsigned short*>(keys) + cache, hs},
                     {static_cast<const unsigned short*>(values) + cache, hs},
                     static_cast<unsigned short*>(out) + static_cast<long long>(b) * T * C + h * hs, C, T,
                     static_cast<int>(static_cast<const long long*>(pos)[b]), scale,
                     static_cast<unsigned char*>(shared));
}

constexpr int part_keys = 128, part_threads = 128;  // of the keys, a block's share

__device__ constexpr int power_of_two_from(int n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

// One new row: a block attends to `part_keys` keys of a head. Bound by reading them and the values once. What the parts
// come to is put together by `join_parts`: of each its largest score, the sum of its exponentials, the sum of its values.
// The part that has the last key writes its row to the cache. parts [B, nh, gridDim.x, hs + 2]. blockIdx: part, head,
// sequence. Shared memory: (part_keys + part_threads / 32 · hs) · 4 bytes.
template <class Number, int nh, int hs, int length>
__device__ void attend_to_part(const void* qkv, const void* pos, void* keys, void* values, void* parts, float scale,
                               void* shared) {
  constexpr int C = nh * hs, chunks = hs / 8, lanes = power_of_two_from(chunks), warps = part_threads / 32;
  const int h = blockIdx.y, b = blockIdx.z, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int last = static_cast<int>(static_cast<const long long*>(pos)[b]);
  const int first = blockIdx.x * part_keys;
  if (first > last) return;
  const int chunk = lane % lanes;  // of a row, this lane's
  const bool has_chunk = chunk < chunks;
  const uint4* fresh = static_cast<const uint4*>(qkv) + (static_cast<long long>(b) * 3 * C + h * hs) / 8 + chunk;
  const long long cache = (static_cast<long long>(b) * nh + h) * length;
  float* scores = static_cast<float*>(shared);
  float* sums = scores + part_keys;
  const uint4 none = make_uint4(0, 0, 0, 0);

  // A chunk of the row at place `at` of this part, of the keys or, `which` being 2, of the values.
  const auto row_at = [&](void* rows, int which, int at) {
    if (!has_chunk) return none;
    uint4* own = static_cast<uint4*>(rows) + cache * chunks + chunk;
    const int key = first + at < last ? first + at : last;
    const uint4 row = key == last ? fresh[which * C / 8] : own[static_cast<long long>(key) * chunks];
    if (first + at == last) own[static_cast<long long>(key) * chunks] = row;
    return row;
  };

  float query[8];
  widen<Number>(query, has_chunk ? fresh[0] : none);
  constexpr int at_once = 32 / lanes;
  const int begin = warp * 32 + lane / lanes;
#pragma unroll 4
  for (int at = begin; at < (warp + 1) * 32; at += at_once) {
    float numbers[8], score = 0.0f;
    widen<Number>(numbers, row_at(keys, 1, at));
#pragma unroll
    for (int e = 0; e < 8; ++e) score += query[e] * numbers[e];
#pragma unroll
    for (int mask = lanes / 2; mask > 0; mask /= 2) score += from_lane_xor(score, mask);
    if (chunk == 0) scores[at] = first + at <= last ? score : -INFINITY;
  }
  __syncthreads();
  float largest = -INFINITY, total = 0.0f;
#pragma unroll
  for (int at = lane; at < part_keys; at += 32) largest = fmaxf(largest, scores[at]);
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) largest = fmaxf(largest, from_lane_xor(largest, mask));
#pragma unroll
  for (int at = lane; at < part_keys; at += 32) total += power_of_two((scores[at] - largest) * scale);
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) total += from_lane_xor(total, mask);

  float mixed[8] = {};
#pragma unroll 4
  for (int at = begin; at < (warp + 1) * 32; at += at_once) {
    float numbers[8];
    widen<Number>(numbers, row_at(values, 2, at));
    const float weight = power_of_two((scores[at] - largest) * scale);
#pragma unroll
    for (int e = 0; e < 8; ++e) mixed[e] += weight * numbers[e];
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) {
#pragma unroll
    for (int mask = lanes; mask < 32; mask *= 2) mixed[e] += from_lane_xor(mixed[e], mask);
    if (lane < lanes && has_chunk) sums[warp * hs + chunk * 8 + e] = mixed[e];
  }
  __syncthreads();
  float* part = static_cast<float*>(parts) +
                ((static_cast<long long>(b) * nh + h) * gridDim.x + blockIdx.x) * (hs + 2);
  for (int d = threadIdx.x; d < hs; d += part_threads) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < warps; ++w) sum += sums[w * hs + d];
    part[d] = sum;
  }
  if (threadIdx.x == 0) {
    part[hs] = largest;
    part[hs + 1] = total;
  }
}

// out [B, 1, nh · hs] from the parts, of which `most` are kept for each head. blockIdx: head, sequence; a thread a column.
template <class Number, int nh, int hs>
__device__ void join_parts(const void* parts, const void* pos, void* out, int most, float scale) {
  const int h = blockIdx.x, b = blockIdx.y, d = threadIdx.x;
  const int count = static_cast<int>(static_cast<const long long*>(pos)[b]) / part_keys + 1;
  const float* own = static_cast<const float*>(parts) + (static_cast<long long>(b) * nh + h) * most * (hs + 2);
  float largest = -INFINITY, total = 0.0f, sum = 0.0f;
  for (int i = 0; i < count; ++i) largest = fmaxf(largest, own[i * (hs + 2) + hs]);
  for (int i = 0; i < count; ++i) {
    const float weight = power_of_two((own[i * (hs + 2) + hs] - largest) * scale);
    total += weight * own[i * (hs + 2) + hs + 1];
    sum += weight * own[i * (hs + 2) + d];
  }
  Narrow<Number>::store(out, (static_cast<long long>(b) * nh + h) * hs + d, sum / total);
}

}  // namespace gpt_frontend
