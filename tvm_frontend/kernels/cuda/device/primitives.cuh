// Thin wrappers of PTX instructions: asynchronous copies, ldmatrix, mma.sync, warp shuffles, ex2, conversions. Names of
// instructions and fragments are those of the PTX ISA (https://docs.nvidia.com/cuda/parallel-thread-execution).
//
// This is the only file with inline assembly: the tests replace it by an emulation of the same functions on the CPU.

namespace gpt_frontend {

// Convert a generic pointer into shared memory to the 32-bit address that the instructions below take.
__device__ inline unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// Start an asynchronous copy of 16 bytes to shared memory. `.cg` caches in L2 alone; both addresses are aligned.
__device__ inline void cp_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}

// The same, but read only the first `src_bytes` (0 … 16) and fill the rest with zeros.
__device__ inline void cp_async(void* shared, const void* global, int src_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(src_bytes)
               : "memory");
}

// Commit this thread's copies since the last commit as one group, which may be empty.
__device__ inline void commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until at most the latest `PENDING` groups of this thread are in flight. Copies of other threads are visible only
// after a following __syncthreads().
template <int PENDING>
__device__ inline void wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Load four 8 × 8 matrices of 16-bit elements. Lane l passes the address of row l % 8 of matrix l / 8, aligned.
// Register i receives matrix i in the layout of the figure "ldmatrix fragment layout for one 8x8 matrix with 16-bit
// elements": lane l holds columns 2 (l % 4) and 2 (l % 4) + 1 of row l / 4.
__device__ inline void ldmatrix_x4(unsigned (&fragment)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row)));
}

// The same with each matrix transposed: lane l holds rows 2 (l % 4) and 2 (l % 4) + 1 of column l / 4.
__device__ inline void ldmatrix_x4_trans(unsigned (&fragment)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row)));
}

// Exchange a value with lane (own ^ mask); all 32 lanes take part.
__device__ inline float shfl_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// 2^x, with an error of at most 2 units in the last place (PTX ISA, ex2.approx.ftz.f32).
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// DTypeTraits: an element type in memory and in the tensor cores. A kernel takes one as a template parameter and uses
//   bytes                  of one element
//   pack(low, high)        two float32 to two 16-bit elements in a register; low(pair), high(pair) convert back
//   to_operand(register)   what a register loaded from memory needs before mma; the identity for 16-bit elements
//   mma(acc, a, b0, b1)    acc [16, 8] += a · b on the tensor cores, with float32 accumulation: 32 bytes along K, which
//                          is mma.m16n8k16 for 16-bit elements and mma.m16n8k8 for tf32
//
// Fragments of m16n8k16, by the figures "MMA .m16n8k16 fragment layout for matrix A", "… for matrix B" and "… for
// accumulator matrix C or D" with .f16/.bf16 type, where g = lane / 4 and t = lane % 4:
//   A [16, 16] row-major: a[0] = (row g, k 2t, 2t+1), a[1] = (g+8, 2t …), a[2] = (g, 2t+8 …), a[3] = (g+8, 2t+8 …)
//   B [16, 8] column-major: b0 = (k 2t, 2t+1, column g), b1 = (k 2t+8, 2t+9, column g)
//   C [16, 8]: acc[0], acc[1] = (row g, columns 2t, 2t+1), acc[2], acc[3] = (row g+8, columns 2t, 2t+1)
// Those of m16n8k8 with .tf32 type have one 4-byte element in the place of two 2-byte ones: a[0] = (g, k t),
// a[2] = (g, t+4), b0 = (k t, g), b1 = (k t+4, g). So ldmatrix, which moves 4 bytes a lane, serves both.
struct Bf16 {
  static constexpr int bytes = 2;
  // Round to nearest, ties to even.
  static __device__ unsigned pack(float low, float high) {
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
  }
  static __device__ float low(unsigned pair) { return __uint_as_float(pair << 16); }
  static __device__ float high(unsigned pair) { return __uint_as_float(pair & 0xffff0000u); }
  static __device__ unsigned to_operand(unsigned pair) { return pair; }
  static __device__ void mma_m16n8k16(float (&acc)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
  static __device__ void mma(float (&acc)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    mma_m16n8k16(acc, a, b0, b1);
  }
};

struct Fp16 {
  static constexpr int bytes = 2;
  // Round to nearest, ties to even.
  static __device__ unsigned pack(float low, float high) {
    unsigned pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
  }
  static __device__ float low(unsigned pair) {
    float value;
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low; }" : "=f"(value) : "r"(pair));
    return value;
  }
  static __device__ float high(unsigned pair) { return low(pair >> 16); }
  static __device__ unsigned to_operand(unsigned pair) { return pair; }
  static __device__ void mma_m16n8k16(float (&acc)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
  static __device__ void mma(float (&acc)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    mma_m16n8k16(acc, a, b0, b1);
  }
};

// float32 in memory. It is rounded to tf32's 11 bits of significand on the way into the tensor cores, which would
// otherwise truncate it.
struct Tf32 {
  static constexpr int bytes = 4;
  static __device__ unsigned to_operand(unsigned bits) {
    unsigned rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
    return rounded;
  }
  static __device__ void mma_m16n8k8(float (&acc)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
  static __device__ void mma(float (&acc)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    mma_m16n8k8(acc, a, b0, b1);
  }
};

}  // namespace gpt_frontend
