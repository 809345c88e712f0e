// A CPU model of what the kernels in kernels/cuda/device need of a GPU: it runs their source as it is.
//
// The threads of a block are coroutines, which run in another random order each time all have had a turn: what forgets
// a barrier reads what is not there yet. Shared memory begins as NaN. copy_async copies when it is waited for, not
// before, and refuses what a GPU would refuse. This file takes the place of primitives.cuh and of CUDA's headers.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __device__

struct Index {
  int x, y, z;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

inline Index threadIdx, blockIdx, gridDim;

namespace emulator {

[[noreturn]] inline void refuse(const char* what) {
  std::fprintf(stderr, "emulated GPU: %s (thread %d of block %d, %d, %d)\n", what, threadIdx.x, blockIdx.x, blockIdx.y,
               blockIdx.z);
  std::abort();
}

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Thread {
  ucontext_t context;
  jmp_buf place;
  bool begun = false, done = false;
  std::vector<Copy> open;                 // copies begun in no group yet
  std::vector<std::vector<Copy>> groups;  // not waited for yet
};

struct Meeting {  // of the threads of a block, or of the lanes of a warp
  int arrived = 0, generation = 0;
};

struct Warp : Meeting {
  const void* in[32];
  void* out[32];
  const void* kind = nullptr;  // of what its lanes meet for
};

constexpr int stack_bytes = 1 << 17;
inline std::vector<Thread> threads;
inline std::vector<std::unique_ptr<char[]>> stacks;  // of thread 0, 1, …, from block to block
inline std::vector<Warp> warps;
inline Meeting barrier;
inline int alive;
inline jmp_buf scheduler;
inline std::vector<unsigned char> shared_memory;
inline unsigned char* shared;
inline int shared_bytes;
inline std::function<void(void*)> body;
inline std::mt19937 order(1);

inline Thread& current() { return threads[threadIdx.x]; }

inline void let_others_run() {
  if (!_setjmp(current().place)) _longjmp(scheduler, 1);
}

inline void begin_thread() {
  body(shared);
  current().done = true;
  --alive;
  _longjmp(scheduler, 1);
}

inline void meet(Meeting& meeting, int everyone) {
  const int generation = meeting.generation;
  if (++meeting.arrived == everyone) {
    meeting.arrived = 0;
    ++meeting.generation;
  } else {
    while (meeting.generation == generation) let_others_run();
  }
}

// All lanes of a warp bring `in` and take `out`; the last to arrive computes for all.
template <class Compute>
void together(const void* in, void* out, Compute compute) {
  static const char kind = 0;  // one address for each use
  Warp& warp = warps[threadIdx.x / 32];
  if (warp.arrived == 0) warp.kind = &kind;
  if (warp.kind != &kind) refuse("lanes of a warp execute different collective instructions");
  warp.in[threadIdx.x % 32] = in;
  warp.out[threadIdx.x % 32] = out;
  if (warp.arrived == 31) compute(warp.in, warp.out);
  meet(warp, 32);
}

inline void check_shared(const void* pointer, int bytes) {
  const unsigned char* at = static_cast<const unsigned char*>(pointer);
  if (at < shared || at + bytes > shared + shared_bytes) refuse("an access beyond the shared memory asked for");
  if (reinterpret_cast<uintptr_t>(at) % 16) refuse("an access to shared memory that is not aligned to 16 bytes");
}

inline void run_block(int count) {
  std::fill(shared_memory.begin(), shared_memory.end(), 0xff);
  threads.clear();
  threads.resize(count);
  while (static_cast<int>(stacks.size()) < count) stacks.emplace_back(new char[stack_bytes]);
  warps.assign((count + 31) / 32, Warp());
  barrier = Meeting();
  alive = count;
  std::vector<int> turns(count);
  for (int i = 0; i < count; ++i) turns[i] = i;
  int idle = 0;
  while (alive > 0) {
    const int before = alive, generation = barrier.generation;
    int met = 0;
    for (const Warp& warp : warps) met += warp.generation;
    std::shuffle(turns.begin(), turns.end(), order);
    for (int turn : turns) {
      volatile int which = turn;
      if (threads[which].done) continue;
      threadIdx = {which, 0, 0};
      if (_setjmp(scheduler)) continue;
      Thread& thread = threads[which];
      if (thread.begun) _longjmp(thread.place, 1);
      thread.begun = true;
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = stacks[which].get();
      thread.context.uc_stack.ss_size = stack_bytes;
      thread.context.uc_link = nullptr;
      makecontext(&thread.context, begin_thread, 0);
      setcontext(&thread.context);
    }
    int met_after = 0;
    for (const Warp& warp : warps) met_after += warp.generation;
    idle = alive == before && barrier.generation == generation && met_after == met ? idle + 1 : 0;
    if (idle > 2) refuse("threads wait for others that never come");
  }
}

template <class Body>
void run(long long x, long long y, long long z, int count, int bytes, Body&& kernel) {
  body = kernel;
  shared_bytes = bytes;
  shared_memory.resize(bytes + 16);
  const uintptr_t first = reinterpret_cast<uintptr_t>(shared_memory.data());
  shared = shared_memory.data() + (16 - first % 16) % 16;
  gridDim = {static_cast<int>(x), static_cast<int>(y), static_cast<int>(z)};
  for (int k = 0; k < z; ++k)
    for (int j = 0; j < y; ++j)
      for (int i = 0; i < x; ++i) {
        blockIdx = {i, j, k};
        run_block(count);
      }
}

inline float float_of(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline unsigned bits_of(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

}  // namespace emulator

inline unsigned __float_as_uint(float value) { return emulator::bits_of(value); }
inline unsigned atomicAdd(unsigned* at, unsigned value) { return (*at += value) - value; }  // threads take turns
inline void __syncthreads() { emulator::meet(emulator::barrier, emulator::alive); }

namespace gpt_frontend {

inline void copy_async(void* shared, const void* global, int bytes = 16) {
  emulator::check_shared(shared, 16);
  if (reinterpret_cast<uintptr_t>(global) % 16) emulator::refuse("cp.async from an address not aligned to 16 bytes");
  if (bytes < 0 || bytes > 16) emulator::refuse("cp.async of more than 16 bytes");
  emulator::current().open.push_back({shared, global, bytes});
}

inline void close_group() {
  emulator::current().groups.push_back(std::move(emulator::current().open));
  emulator::current().open.clear();
}

template <int left>
void wait_for_groups() {
  auto& groups = emulator::current().groups;
  while (static_cast<int>(groups.size()) > left) {
    for (const emulator::Copy& copy : groups.front()) {
      unsigned char sixteen[16] = {};
      std::memcpy(sixteen, copy.from, copy.bytes);
      std::memcpy(copy.to, sixteen, 16);
    }
    groups.erase(groups.begin());
  }
}

template <bool transposed>
void load_any(unsigned (&to)[4], const void* row) {
  emulator::check_shared(row, 16);
  emulator::together(row, to, [](const void* const* rows, void* const* outs) {
    for (int lane = 0; lane < 32; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix) {
        uint16_t pair[2];
        for (int i = 0; i < 2; ++i) {
          const int r = transposed ? lane % 4 * 2 + i : lane / 4, c = transposed ? lane / 4 : lane % 4 * 2 + i;
          pair[i] = static_cast<const uint16_t*>(rows[matrix * 8 + r])[c];
        }
        static_cast<unsigned*>(outs[lane])[matrix] = pair[0] | static_cast<unsigned>(pair[1]) << 16;
      }
  });
}

inline void load_matrices(unsigned (&to)[4], const void* row) { load_any<false>(to, row); }
inline void load_matrices_transposed(unsigned (&to)[4], const void* row) { load_any<true>(to, row); }

inline float from_lane_xor(float value, int mask) {
  struct Bring {
    float value;
    int mask;
  } bring{value, mask};
  float out;
  emulator::together(&bring, &out, [](const void* const* in, void* const* outs) {
    for (int lane = 0; lane < 32; ++lane) {
      const Bring* own = static_cast<const Bring*>(in[lane]);
      *static_cast<float*>(outs[lane]) = static_cast<const Bring*>(in[lane ^ own->mask])->value;
    }
  });
  return out;
}

inline float power_of_two(float x) { return std::exp2(x); }

// sum [16, 8] += a [16, 2 · 4 · each] · b [.., 8], `each` numbers a register.
template <class Number>
void multiply_add_any(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  struct Bring {
    const unsigned* a;
    unsigned b[2];
    float* sum;
  } bring{a, {b0, b1}, sum};
  emulator::together(&bring, sum, [](const void* const* in, void* const* outs) {
    constexpr int each = 4 / Number::bytes, K = 8 * each;
    double A[16][K], B[K][8];
    for (int lane = 0; lane < 32; ++lane) {
      const Bring* own = static_cast<const Bring*>(in[lane]);
      for (int part = 0; part < each; ++part) {
        for (int i = 0; i < 4; ++i)
          A[lane / 4 + i % 2 * 8][lane % 4 * each + i / 2 * 4 * each + part] = Number::value(own->a[i], part);
        for (int i = 0; i < 2; ++i) B[lane % 4 * each + i * 4 * each + part][lane / 4] = Number::value(own->b[i], part);
      }
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        double total = static_cast<const Bring*>(in[lane])->sum[i];
        for (int k = 0; k < K; ++k) total += A[row][k] * B[k][column];
        static_cast<float*>(outs[lane])[i] = static_cast<float>(total);
      }
  });
}

struct Bf16 {
  static constexpr int bytes = 2;
  static unsigned round(float x) {
    const unsigned bits = emulator::bits_of(x);
    return x != x ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  }
  static unsigned pack(float first, float second) { return round(first) | round(second) << 16; }
  static float first(unsigned both) { return emulator::float_of(both << 16); }
  static float second(unsigned both) { return emulator::float_of(both & 0xffff0000u); }
  static unsigned operand(unsigned both) { return both; }
  static double value(unsigned both, int part) { return part ? second(both) : first(both); }
  static void multiply_add(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    multiply_add_any<Bf16>(sum, a, b0, b1);
  }
};

struct Fp16 {
  static constexpr int bytes = 2;
  static unsigned round(float x) {
    const _Float16 half = static_cast<_Float16>(x);
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
  }
  static unsigned pack(float first, float second) { return round(first) | round(second) << 16; }
  static float first(unsigned both) {
    const uint16_t bits = static_cast<uint16_t>(both);
    _Float16 half;
    std::memcpy(&half, &bits, 2);
    return static_cast<float>(half);
  }
  static float second(unsigned both) { return first(both >> 16); }
  static unsigned operand(unsigned both) { return both; }
  static double value(unsigned both, int part) { return part ? second(both) : first(both); }
  static void multiply_add(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    multiply_add_any<Fp16>(sum, a, b0, b1);
  }
};

struct Tf32 {
  static constexpr int bytes = 4;
  static unsigned operand(unsigned bits) { return (bits + 0x1000u) & 0xffffe000u; }
  static double value(unsigned bits, int) { return emulator::float_of(bits & 0xffffe000u); }
  static void multiply_add(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    multiply_add_any<Tf32>(sum, a, b0, b1);
  }
};

}  // namespace gpt_frontend
