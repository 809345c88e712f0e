// Sample the next token of each sequence on the device that has its logits, so that a decode step needs nothing of the
// host.
//
//   blockIdx.x                  sequences, one a block
//   radix_select_kth            4 passes over V, 8 bits each  histogram of 256 counts: shared memory
//   v                           V, strided by threads         the thread's best score and token: registers
//   reduction                   lanes by shuffles, then warps through shared memory

namespace gpt_frontend {

// Map float32 to unsigned integers of the same order: set the sign bit of non-negative numbers, invert negative ones.
__device__ inline unsigned ordered_bits(float x) {
  const unsigned bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The finaliser of SplitMix64 (https://doi.org/10.1145/2660193.2660195): every bit of the result depends on all of x.
__device__ inline unsigned long long splitmix64(unsigned long long x) {
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ x >> 27) * 0x94d049bb133111ebull;
  return x ^ x >> 31;
}

// Gumbel(0, 1) noise for one token, by counter: the key stands for seed, sequence and position. The argmax of logits
// with such noise added is a sample of their softmax (the Gumbel-max trick).
__device__ inline float gumbel_noise(unsigned long long key, int token) {
  const unsigned bits = static_cast<unsigned>(splitmix64(key + 0x9e3779b97f4a7c15ull * (token + 1ull)) >> 41);
  const float uniform = (bits + 0.5f) * (1.0f / (1 << 23));  // 23 bits and the half are exact, so never 0 and never 1
  return -logf(-log1pf(-uniform));  // log1p: the noise that wins is of a uniform near 0, where floats are dense
}

// Radix select: the ordered_bits of the k-th largest of logits [V], found from its highest 8-bit digit to its lowest.
// prefix: the digits found so far. prefix_mask: their bits. A pass counts the digit's values among the logits that have
// the prefix, and walks down from the largest until k of them are covered.
template <int V, int THREADS>
__device__ unsigned radix_select_kth(const float* logits, int k, unsigned* histogram) {
  unsigned prefix = 0, prefix_mask = 0;
  int left = k;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < 256; i += THREADS) histogram[i] = 0;
    __syncthreads();
    for (int v = threadIdx.x; v < V; v += THREADS) {
      const unsigned bits = ordered_bits(logits[v]);
      if ((bits & prefix_mask) == prefix) atomicAdd(&histogram[bits >> shift & 255u], 1u);
    }
    __syncthreads();
    int digit = 255;
    while (digit > 0 && static_cast<int>(histogram[digit]) < left) left -= histogram[digit--];
    prefix |= static_cast<unsigned>(digit) << shift;
    prefix_mask |= 255u << shift;
    __syncthreads();
  }
  return prefix;
}

// Sample from logits [B, 1, V] of the tokens at positions pos [B]. The sampled token goes to ids [B, 1] and to column
// pos + 1 of text [B, length], if there is one; then pos is raised by 1. settings, float64 [3]: top_k, the number of
// largest logits that are sampled from; the temperature, 0 for the argmax; the seed. Of equal logits the argmax is the
// first. blockIdx: sequence. Shared memory: 1024 + 8 · THREADS / 32 bytes.
template <int V, int THREADS>
__device__ void sample(const void* logits, void* ids, void* pos, void* text, const void* settings, int length,
                       void* shared) {
  static_assert(V <= 1 << 24, "a token is kept in a float32, for the shuffles");
  const int b = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float* row = static_cast<const float*>(logits) + static_cast<long long>(b) * V;
  const double* setting = static_cast<const double*>(settings);
  const int top_k = static_cast<int>(setting[0]);
  const float temperature = static_cast<float>(setting[1]);
  long long* position = static_cast<long long*>(pos) + b;
  const unsigned long long key =
      splitmix64(splitmix64(splitmix64(static_cast<unsigned long long>(setting[2])) + b) + *position);
  const bool is_random = temperature > 0.0f && top_k > 1;
  const unsigned kth =
      is_random && top_k < V ? radix_select_kth<V, THREADS>(row, top_k, static_cast<unsigned*>(shared)) : 0;

  float best = -INFINITY, token = static_cast<float>(threadIdx.x < V ? threadIdx.x : 0);
#pragma unroll 4
  for (int v = threadIdx.x; v < V; v += THREADS) {
    const float logit = row[v];
    const float score = !is_random                  ? logit
                        : ordered_bits(logit) < kth ? -INFINITY
                                                    : logit / temperature + gumbel_noise(key, v);
    if (score > best) {
      best = score;
      token = static_cast<float>(v);
    }
  }
  const auto take_better = [&](float other, float other_token) {
    if (other > best || (other == best && other_token < token)) {
      best = other;
      token = other_token;
    }
  };
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const float other = shfl_xor(best, mask), other_token = shfl_xor(token, mask);
    take_better(other, other_token);
  }
  float* warp_best = static_cast<float*>(shared) + 256;  // behind the histogram
  float* warp_token = warp_best + THREADS / 32;
  if (lane == 0) {
    warp_best[warp] = best;
    warp_token[warp] = token;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < THREADS / 32; ++w) take_better(warp_best[w], warp_token[w]);
  const long long sampled = static_cast<long long>(token), next = *position + 1;
  static_cast<long long*>(ids)[b] = sampled;
  if (next < length) static_cast<long long*>(text)[static_cast<long long>(b) * length + next] = sampled;
  *position = next;
}

}  // namespace gpt_frontend
