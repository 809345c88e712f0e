// LayerNorm and the embedding: kernels that are bound by reading and writing each row once.
//
//   layer_norm   blockIdx.x, warp   rows, one a warp      a row of C floats: registers, ⌈C / 32⌉ a lane, read once
//   embed        blockIdx.x, .y     tokens t, sequences b; the block's threads run along C

namespace gpt_frontend {

// Normalise x [rows, C] over C. The variance is the mean of squared deviations from the mean, both computed from
// registers: E[x²] - E[x]² would cancel for rows far from 0.
template <int C, int WARPS, class Store>
__device__ void layer_norm(const void* x, const void* gain, const void* bias, void* out, int rows, float epsilon) {
  constexpr int VALUES = (C + 31) / 32;
  const int lane = threadIdx.x % 32, row = blockIdx.x * WARPS + threadIdx.x / 32;
  if (row >= rows) return;
  const float* x_row = static_cast<const float*>(x) + static_cast<long long>(row) * C;
  float values[VALUES], sum = 0.0f, squares = 0.0f;
#pragma unroll
  for (int i = 0; i < VALUES; ++i) {
    values[i] = i * 32 + lane < C ? x_row[i * 32 + lane] : 0.0f;
    sum += values[i];
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) sum += shfl_xor(sum, mask);
  const float mean = sum / C;
#pragma unroll
  for (int i = 0; i < VALUES; ++i)
    if (i * 32 + lane < C) squares += (values[i] - mean) * (values[i] - mean);
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) squares += shfl_xor(squares, mask);
  const float scale = rsqrtf(squares / C + epsilon);
  const float* gains = static_cast<const float*>(gain);
  const float* biases = static_cast<const float*>(bias);
#pragma unroll
  for (int i = 0; i < VALUES; ++i) {
    const int c = i * 32 + lane;
    if (c < C)
      Store::store(out, static_cast<long long>(row) * C + c, (values[i] - mean) * scale * gains[c] + biases[c]);
  }
}

// out [B, T, C] = tokens[ids] + positions[t]; with HAS_POS, positions[pos[b] + t]. blockIdx: t, b.
template <int C, int THREADS, bool HAS_POS>
__device__ void embed(const void* tokens, const void* ids, const void* positions, const void* pos, void* out, int T) {
  const int t = blockIdx.x, b = blockIdx.y;
  const long long row = static_cast<long long>(b) * T + t;
  const long long id = static_cast<const long long*>(ids)[row];
  const long long offset = HAS_POS ? static_cast<const long long*>(pos)[b] : 0;
  const float* token = static_cast<const float*>(tokens) + id * C;
  const float* position = static_cast<const float*>(positions) + (offset + t) * C;
  for (int c = threadIdx.x; c < C; c += THREADS) static_cast<float*>(out)[row * C + c] = token[c] + position[c];
}

}  // namespace gpt_frontend
