// Small named functions around the instructions that have no CUDA C++: asynchronous copies into
// shared memory, and the tensor cores' 16-bit matrices.
//
// A fragment is what a lane holds of a matrix. Of an 8 x 8 matrix of 16-bit elements lane l holds
// row l / 4, columns 2 * (l % 4) and the next one, as one word. Of C [16, 8] in fp32 it holds rows
// l / 4 (c[0], c[1]) and l / 4 + 8 (c[2], c[3]) of the same two columns.
#pragma once

#include <cstdint>

#include "kvcomp/device.cuh"

#ifdef __CUDACC__

namespace kvcomp {

__device__ inline unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// 16 bytes, both addresses aligned to that; zeros where not `wanted`, and `from` is not read then.
__device__ inline void copy_async(void* shared, const void* from, bool wanted) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(from), "r"(wanted ? 16 : 0)
               : "memory");
}
// The same for 4 bytes.
__device__ inline void copy_word_async(void* shared, const void* from, bool wanted) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)),
               "l"(from), "r"(wanted ? 4 : 0)
               : "memory");
}
// What this thread has asked for since the last time is a group.
__device__ inline void end_copy_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all of this thread's groups but the kLater latest.
template <int kLater>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLater) : "memory");
}

// Four 8 x 8 matrices; lane l names row l % 8 of matrix l / 8, 16 aligned bytes of shared memory.
__device__ inline void load_matrices(unsigned (&fragment)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void load_matrices_transposed(unsigned (&fragment)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline unsigned transpose_matrix(unsigned fragment) {
  unsigned transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(fragment));
  return transposed;
}

// C [16, 8] += A [16, 16] B [16, 8]. A: the 8 x 8 matrices at (0, 0), (8, 0), (0, 8), (8, 8).
// B: the transposes of its upper and of its lower 8 rows.
__device__ inline void multiply_add(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                                    __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7},"
      " {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void multiply_add(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                                    __half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7},"
      " {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace kvcomp

#else
#include "emulator/matrix.h"
#endif

namespace kvcomp {

// Two numbers as the 16-bit elements of a word, the first in the low half.
__device__ inline unsigned pack(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  unsigned word;
  memcpy(&word, &pair, sizeof word);
  return word;
}
__device__ inline unsigned pack(float low, float high, __half) {
  const __half2 pair = __floats2half2_rn(low, high);
  unsigned word;
  memcpy(&word, &pair, sizeof word);
  return word;
}

}  // namespace kvcomp
