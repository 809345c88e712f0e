// An emulator that runs the source of the kernels in kernels/cuda/device on the CPU, unchanged. It takes the place of
// primitives.cuh and of CUDA's headers.
//
// `emulator.py` compiles it. It is strict where a GPU is lenient, so that mistakes show:
//   - The threads of a block are coroutines that are resumed in a new random order in each round: a kernel that
//     lacks a barrier reads data that is not there yet.
//   - Shared memory is filled with NaN before each block.
//   - cp_async copies when its group is waited for, and not earlier.
//   - Misaligned or out-of-range accesses, and lanes that diverge at a collective instruction, end the process.
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
  void* target;
  const void* source;
  int bytes;
};

struct Thread {
  ucontext_t context;
  jmp_buf resume_point;
  bool started = false, done = false;
  std::vector<Copy> uncommitted;           // asynchronous copies that are in no group yet
  std::vector<std::vector<Copy>> pending;  // groups that were committed, oldest first, and not waited for yet
};

// A barrier of the threads of a block, or of the lanes of a warp. `generation` counts how often all have arrived.
struct Barrier {
  int arrived = 0, generation = 0;
};

struct Warp : Barrier {
  const void* in[32];
  void* out[32];
  const void* instruction = nullptr;  // the collective instruction that its lanes have arrived at
};

constexpr int stack_bytes = 1 << 17;
inline std::vector<Thread> threads;
inline std::vector<std::unique_ptr<char[]>> stacks;  // of thread 0, 1, …; reused by every block
inline std::vector<Warp> warps;
inline Barrier block_barrier;
inline int alive;
inline jmp_buf scheduler;
inline std::vector<unsigned char> shared_memory;
inline unsigned char* shared;
inline int shared_bytes;
inline std::function<void(void*)> body;
inline std::mt19937 order(1);

inline Thread& current() { return threads[threadIdx.x]; }

// Suspend this thread until the scheduler resumes it.
inline void yield() {
  if (!_setjmp(current().resume_point)) _longjmp(scheduler, 1);
}

inline void begin_thread() {
  body(shared);
  current().done = true;
  --alive;
  _longjmp(scheduler, 1);
}

inline void arrive_and_wait(Barrier& barrier, int participants) {
  const int generation = barrier.generation;
  if (++barrier.arrived == participants) {
    barrier.arrived = 0;
    ++barrier.generation;
  } else {
    while (barrier.generation == generation) yield();
  }
}

// A collective instruction of a warp: each lane gives `in` and receives `out`; the last to arrive computes for all.
template <class Compute>
void warp_collective(const void* in, void* out, Compute compute) {
  static const char instruction = 0;  // its address tells one instantiation from another
  Warp& warp = warps[threadIdx.x / 32];
  if (warp.arrived == 0) warp.instruction = &instruction;
  if (warp.instruction != &instruction) refuse("lanes of a warp execute different collective instructions");
  warp.in[threadIdx.x % 32] = in;
  warp.out[threadIdx.x % 32] = out;
  if (warp.arrived == 31) compute(warp.in, warp.out);
  arrive_and_wait(warp, 32);
}

inline void check_shared(const void* pointer, int bytes) {
  const unsigned char* address = static_cast<const unsigned char*>(pointer);
  if (address < shared || address + bytes > shared + shared_bytes)
    refuse("an access beyond the shared memory asked for");
  if (reinterpret_cast<uintptr_t>(address) % 16) refuse("an access to shared memory that is not aligned to 16 bytes");
}

// Run the threads of one block to their end. A round in which no thread ends and no barrier opens is idle; after three
// of them the block is deadlocked.
inline void run_block(int count) {
  std::fill(shared_memory.begin(), shared_memory.end(), 0xff);
  threads.clear();
  threads.resize(count);
  while (static_cast<int>(stacks.size()) < count) stacks.emplace_back(new char[stack_bytes]);
  warps.assign((count + 31) / 32, Warp());
  block_barrier = Barrier();
  alive = count;
  std::vector<int> round(count);
  for (int i = 0; i < count; ++i) round[i] = i;
  int idle = 0;
  while (alive > 0) {
    const int before = alive, generation = block_barrier.generation;
    int opened = 0;
    for (const Warp& warp : warps) opened += warp.generation;
    std::shuffle(round.begin(), round.end(), order);
    for (int index : round) {
      volatile int which = index;  // volatile: it survives the longjmp
      if (threads[which].done) continue;
      threadIdx = {which, 0, 0};
      if (_setjmp(scheduler)) continue;
      Thread& thread = threads[which];
      if (thread.started) _longjmp(thread.resume_point, 1);
      thread.started = true;
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = stacks[which].get();
      thread.context.uc_stack.ss_size = stack_bytes;
      thread.context.uc_link = nullptr;
      makecontext(&thread.context, begin_thread, 0);
      setcontext(&thread.context);
    }
    int opened_after = 0;
    for (const Warp& warp : warps) opened_after += warp.generation;
    idle = alive == before && block_barrier.generation == generation && opened_after == opened ? idle + 1 : 0;
    if (idle > 2) refuse("threads wait for others that never come");
  }
}

// Launch a kernel: x · y · z blocks of `count` threads with `bytes` of shared memory, one block after the other.
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
// Threads are resumed one at a time, so a plain addition is atomic.
inline unsigned atomicAdd(unsigned* address, unsigned value) { return (*address += value) - value; }
inline void __syncthreads() { emulator::arrive_and_wait(emulator::block_barrier, emulator::alive); }

namespace gpt_frontend {

inline void cp_async(void* shared, const void* global, int src_bytes = 16) {
  emulator::check_shared(shared, 16);
  if (reinterpret_cast<uintptr_t>(global) % 16) emulator::refuse("cp.async from an address not aligned to 16 bytes");
  if (src_bytes < 0 || src_bytes > 16) emulator::refuse("cp.async of more than 16 bytes");
  emulator::current().uncommitted.push_back({shared, global, src_bytes});
}

inline void commit_group() {
  emulator::current().pending.push_back(std::move(emulator::current().uncommitted));
  emulator::current().uncommitted.clear();
}

template <int PENDING>
void wait_group() {
  auto& pending = emulator::current().pending;
  while (static_cast<int>(pending.size()) > PENDING) {
    for (const emulator::Copy& copy : pending.front()) {
      unsigned char chunk[16] = {};  // zeros beyond src_bytes
      std::memcpy(chunk, copy.source, copy.bytes);
      std::memcpy(copy.target, chunk, 16);
    }
    pending.erase(pending.begin());
  }
}

// PTX ISA, "ldmatrix fragment layout for one 8x8 matrix with 16-bit elements", of four matrices.
template <bool TRANSPOSED>
void emulate_ldmatrix(unsigned (&fragment)[4], const void* row) {
  emulator::check_shared(row, 16);
  emulator::warp_collective(row, fragment, [](const void* const* rows, void* const* outs) {
    for (int lane = 0; lane < 32; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix) {
        uint16_t pair[2];
        for (int i = 0; i < 2; ++i) {
          const int r = TRANSPOSED ? lane % 4 * 2 + i : lane / 4, c = TRANSPOSED ? lane / 4 : lane % 4 * 2 + i;
          pair[i] = static_cast<const uint16_t*>(rows[matrix * 8 + r])[c];
        }
        static_cast<unsigned*>(outs[lane])[matrix] = pair[0] | static_cast<unsigned>(pair[1]) << 16;
      }
  });
}

inline void ldmatrix_x4(unsigned (&fragment)[4], const void* row) { emulate_ldmatrix<false>(fragment, row); }
inline void ldmatrix_x4_trans(unsigned (&fragment)[4], const void* row) { emulate_ldmatrix<true>(fragment, row); }

inline float shfl_xor(float value, int mask) {
  struct Input {
    float value;
    int mask;
  } input{value, mask};
  float out;
  emulator::warp_collective(&input, &out, [](const void* const* in, void* const* outs) {
    for (int lane = 0; lane < 32; ++lane) {
      const Input* own = static_cast<const Input*>(in[lane]);
      *static_cast<float*>(outs[lane]) = static_cast<const Input*>(in[lane ^ own->mask])->value;
    }
  });
  return out;
}

inline float exp2_approx(float x) { return std::exp2(x); }

// acc [16, 8] += a [16, K] · b [K, 8], added up in float64 and rounded once. PTX ISA, "MMA .m16n8k16 fragment layout
// for matrix A", "… B", "… accumulator matrix C or D", with PACK elements of 16 bits a register; with one element of 32
// bits they are the layouts of m16n8k8 for tf32. Register i of a has half i % 2 of the rows, and half i / 2 of K.
template <class DTypeTraits>
void emulate_mma(float (&acc)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  struct Input {
    const unsigned* a;
    unsigned b[2];
    float* acc;
  } input{a, {b0, b1}, acc};
  emulator::warp_collective(&input, acc, [](const void* const* in, void* const* outs) {
    constexpr int PACK = 4 / DTypeTraits::bytes, K = 8 * PACK;
    double A[16][K], B[K][8];
    for (int lane = 0; lane < 32; ++lane) {
      const Input* own = static_cast<const Input*>(in[lane]);
      for (int part = 0; part < PACK; ++part) {
        for (int i = 0; i < 4; ++i)
          A[lane / 4 + i % 2 * 8][lane % 4 * PACK + i / 2 * 4 * PACK + part] = DTypeTraits::value(own->a[i], part);
        for (int i = 0; i < 2; ++i)
          B[lane % 4 * PACK + i * 4 * PACK + part][lane / 4] = DTypeTraits::value(own->b[i], part);
      }
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        double sum = static_cast<const Input*>(in[lane])->acc[i];
        for (int k = 0; k < K; ++k) sum += A[row][k] * B[k][column];
        static_cast<float*>(outs[lane])[i] = static_cast<float>(sum);
      }
  });
}

struct Bf16 {
  static constexpr int bytes = 2;
  static unsigned round(float x) {
    const unsigned bits = emulator::bits_of(x);
    return x != x ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  }
  static unsigned pack(float low, float high) { return round(low) | round(high) << 16; }
  static float low(unsigned pair) { return emulator::float_of(pair << 16); }
  static float high(unsigned pair) { return emulator::float_of(pair & 0xffff0000u); }
  static unsigned to_operand(unsigned pair) { return pair; }
  static double value(unsigned pair, int part) { return part ? high(pair) : low(pair); }
  static void mma_m16n8k16(float (&acc)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    emulate_mma<Bf16>(acc, a, b0, b1);
  }
  static void mma(float (&acc)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) { mma_m16n8k16(acc, a, b0, b1); }
};

struct Fp16 {
  static constexpr int bytes = 2;
  static unsigned round(float x) {
    const _Float16 half = static_cast<_Float16>(x);
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
  }
  static unsigned pack(float low, float high) { return round(low) | round(high) << 16; }
  static float low(unsigned pair) {
    const uint16_t bits = static_cast<uint16_t>(pair);
    _Float16 half;
    std::memcpy(&half, &bits, 2);
    return static_cast<float>(half);
  }
  static float high(unsigned pair) { return low(pair >> 16); }
  static unsigned to_operand(unsigned pair) { return pair; }
  static double value(unsigned pair, int part) { return part ? high(pair) : low(pair); }
  static void mma_m16n8k16(float (&acc)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    emulate_mma<Fp16>(acc, a, b0, b1);
  }
  static void mma(float (&acc)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) { mma_m16n8k16(acc, a, b0, b1); }
};

struct Tf32 {
  static constexpr int bytes = 4;
  static unsigned to_operand(unsigned bits) { return (bits + 0x1000u) & 0xffffe000u; }
  static double value(unsigned bits, int) { return emulator::float_of(bits & 0xffffe000u); }
  static void mma_m16n8k8(float (&acc)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    emulate_mma<Tf32>(acc, a, b0, b1);
  }
  static void mma(float (&acc)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) { mma_m16n8k8(acc, a, b0, b1); }
};

}  // namespace gpt_frontend
