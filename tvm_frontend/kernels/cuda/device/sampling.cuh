// The next token of each sequence, chosen where its logits are, so that a step needs nothing of the host.

namespace gpt_frontend {

// float32 as an unsigned number of the same order.
__device__ inline unsigned in_order(float x) {
  const unsigned bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The finalizer of SplitMix64 (https://doi.org/10.1145/2660193.2660195): every bit of the result depends on all of x.
__device__ inline unsigned long long mixed(unsigned long long x) {
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ x >> 27) * 0x94d049bb133111ebull;
  return x ^ x >> 31;
}

// Of the Gumbel distribution, another one for each seed, sequence, place and token. The largest of logits with such a
// number added to each is a draw from their softmax.
__device__ inline float gumbel(unsigned long long key, int token) {
  const unsigned bits = static_cast<unsigned>(mixed(key + 0x9e3779b97f4a7c15ull * (token + 1ull)) >> 40);  // 24 bits
  return -logf(-logf((bits + 0.5f) * (1.0f / (1 << 24))));
}

// The smallest number, as in_order gives it, that is among the `most` largest of logits [V]: digit by digit, 8 bits each.
template <int V, int threads>
__device__ unsigned least_of_largest(const float* logits, int most, unsigned* counts) {
  unsigned found = 0, known = 0;
  int left = most;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < 256; i += threads) counts[i] = 0;
    __syncthreads();
    for (int v = threadIdx.x; v < V; v += threads) {
      const unsigned number = in_order(logits[v]);
      if ((number & known) == found) atomicAdd(&counts[number >> shift & 255u], 1u);
    }
    __syncthreads();
    int digit = 255;
    while (digit > 0 && static_cast<int>(counts[digit]) < left) left -= counts[digit--];
    found |= static_cast<unsigned>(digit) << shift;
    known |= 255u << shift;
    __syncthreads();
  }
  return found;
}

// From logits [B, 1, V] of the tokens at pos [B]: the token behind each goes to ids [B, 1] and to its place in text
// [B, length], and pos is then its place. settings: float64 of how many of the likeliest it is drawn from, the
// temperature, 0 for the likeliest, and the seed. Of equal logits the first is the likeliest. blockIdx: sequence.
// Shared memory: 1024 + 8 · threads / 32 bytes.
template <int V, int threads>
__device__ void choose(const void* logits, void* ids, void* pos, void* text, const void* settings, int length,
                       void* shared) {
  static_assert(V <= 1 << 24, "a token is kept in a float32");
  const int b = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float* own = static_cast<const float*>(logits) + static_cast<long long>(b) * V;
  const double* setting = static_cast<const double*>(settings);
  const int most = static_cast<int>(setting[0]);
  const float temperature = static_cast<float>(setting[1]);
  long long* place = static_cast<long long*>(pos) + b;
  const unsigned long long key = mixed(mixed(mixed(static_cast<unsigned long long>(setting[2])) + b) + *place);
  const bool draws = temperature > 0.0f && most > 1;
  const unsigned least =
      draws && most < V ? least_of_largest<V, threads>(own, most, static_cast<unsigned*>(shared)) : 0;

  float best = -INFINITY, token = static_cast<float>(threadIdx.x < V ? threadIdx.x : 0);
#pragma unroll 4
  for (int v = threadIdx.x; v < V; v += threads) {
    const float logit = own[v];
    const float score = !draws ? logit : in_order(logit) < least ? -INFINITY : logit / temperature + gumbel(key, v);
    if (score > best) {
      best = score;
      token = static_cast<float>(v);
    }
  }
  const auto take_better = [&](float other, float its_token) {
    if (other > best || (other == best && its_token < token)) {
      best = other;
      token = its_token;
    }
  };
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const float other = from_lane_xor(best, mask), its_token = from_lane_xor(token, mask);
    take_better(other, its_token);
  }
  float* bests = static_cast<float*>(shared) + 256;
  float* tokens = bests + threads / 32;
  if (lane == 0) {
    bests[warp] = best;
    tokens[warp] = token;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < threads / 32; ++w) take_better(bests[w], tokens[w]);
  const long long chosen = static_cast<long long>(token), next = *place + 1;
  static_cast<long long*>(ids)[b] = chosen;
  if (next < length) static_cast<long long*>(text)[static_cast<long long>(b) * length + next] = chosen;
  *place = next;
}

}  // namespace gpt_frontend
