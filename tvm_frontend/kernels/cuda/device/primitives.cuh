// What the kernels here ask of the machine, an instruction or two each. The names of the instructions, and how a warp
// shares out the elements of a matrix, are those of the PTX ISA (https://docs.nvidia.com/cuda/parallel-thread-execution).
//
// This is the only file with assembly: tests put one of their own in its place, which does the same on a CPU.

namespace gpt_frontend {

// A shared-memory address as instructions take it.
__device__ inline unsigned address_of(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// Begin to copy 16 bytes to shared memory.
__device__ inline void copy_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address_of(shared)), "l"(global) : "memory");
}

// The same of the first `bytes` of 16; zeros fill the rest.
__device__ inline void copy_async(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address_of(shared)), "l"(global), "r"(bytes)
               : "memory");
}

// All copies begun since the last such call are one group.
__device__ inline void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until at most `left` groups, the latest, are on their way. Other threads' copies are there after the next barrier.
template <int left>
__device__ inline void wait_for_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}

// Four 8 × 8 matrices of 16-bit elements, whose rows lane l points at: row l % 8 of matrix l / 8. Lane l is given
// elements 2 (l % 4) and the next of row l / 4 of each.
__device__ inline void load_matrices(unsigned (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address_of(row)));
}

// The same, each transposed.
__device__ inline void load_matrices_transposed(unsigned (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address_of(row)));
}

// The value of the lane whose number differs in the bits of `mask`.
__device__ inline float from_lane_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// 2^x. Its error is at most 2 units in the last place (PTX ISA, ex2.approx).
__device__ inline float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A type of number in memory and in the tensor cores, which add up in float32: sum [16, 8] += a [16, 16] · b [16, 8],
// or of 32-bit numbers a [16, 8] · b [8, 8].
struct Bf16 {
  static constexpr int bytes = 2;
  // Two numbers, rounded to nearest, ties to even: the first in the lower half.
  static __device__ unsigned pack(float first, float second) {
    unsigned both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
  }
  static __device__ float first(unsigned both) { return __uint_as_float(both << 16); }
  static __device__ float second(unsigned both) { return __uint_as_float(both & 0xffff0000u); }
  static __device__ unsigned operand(unsigned both) { return both; }
  static __device__ void multiply_add(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

struct Fp16 {
  static constexpr int bytes = 2;
  static __device__ unsigned pack(float first, float second) {
    unsigned both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
  }
  static __device__ float first(unsigned both) {
    float value;
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low; }" : "=f"(value) : "r"(both));
    return value;
  }
  static __device__ float second(unsigned both) { return first(both >> 16); }
  static __device__ unsigned operand(unsigned both) { return both; }
  static __device__ void multiply_add(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

// float32 in memory, rounded to 11 bits as it goes into the tensor cores, which would cut it off.
struct Tf32 {
  static constexpr int bytes = 4;
  static __device__ unsigned operand(unsigned bits) {
    unsigned rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
    return rounded;
  }
  static __device__ void multiply_add(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

}  // namespace gpt_frontend
