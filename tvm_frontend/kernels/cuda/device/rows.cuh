// What is done row by row, and bound by reading and writing it once: LayerNorm and the embedding.

namespace gpt_frontend {

// LayerNorm of x [rows, C] over C, a warp a row: the mean, then the mean of squares about it, both from registers.
template <int C, int warps, class Out>
__device__ void layer_norm(const void* x, const void* gain, const void* bias, void* out, int rows, float epsilon) {
  constexpr int each = (C + 31) / 32;
  const int lane = threadIdx.x % 32, row = blockIdx.x * warps + threadIdx.x / 32;
  if (row >= rows) return;
  const float* from = static_cast<const float*>(x) + static_cast<long long>(row) * C;
  float values[each], sum = 0.0f, squares = 0.0f;
#pragma unroll
  for (int i = 0; i < each; ++i) {
    values[i] = i * 32 + lane < C ? from[i * 32 + lane] : 0.0f;
    sum += values[i];
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) sum += from_lane_xor(sum, mask);
  const float mean = sum / C;
#pragma unroll
  for (int i = 0; i < each; ++i)
    if (i * 32 + lane < C) squares += (values[i] - mean) * (values[i] - mean);
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) squares += from_lane_xor(squares, mask);
  const float scale = rsqrtf(squares / C + epsilon);
#pragma unroll
  for (int i = 0; i < each; ++i) {
    const int c = i * 32 + lane;
    if (c < C)
      Out::store(out, static_cast<long long>(row) * C + c,
                 (values[i] - mean) * scale * static_cast<const float*>(gain)[c] + static_cast<const float*>(bias)[c]);
  }
}

// out [B, T, C] = tokens[ids] + positions[t], or behind pos [B] positions[pos + t]. blockIdx: t, b.
template <int C, int threads, bool is_behind>
__device__ void embed(const void* tokens, const void* ids, const void* positions, const void* pos, void* out, int T) {
  const int t = blockIdx.x, b = blockIdx.y;
  const long long place = static_cast<long long>(b) * T + t;
  const long long id = static_cast<const long long*>(ids)[place];
  const long long behind = is_behind ? static_cast<const long long*>(pos)[b] : 0;
  const float* token = static_cast<const float*>(tokens) + id * C;
  const float* position = static_cast<const float*>(positions) + (behind + t) * C;
  for (int c = threadIdx.x; c < C; c += threads) static_cast<float*>(out)[place * C + c] = token[c] + position[c];
}

}  // namespace gpt_frontend
