// What every kernel includes first: CUDA, or the emulator that runs device code on the CPU, and the
// device functions that kernels share. Torch-free.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kvcomp/params.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include "emulator/cuda.h"  // CUDA's words as plain C++
#endif

namespace kvcomp {

inline constexpr unsigned kFullMask = 0xffffffffu;
inline constexpr float kLog2e = 1.4426950408889634f;

#ifdef __CUDACC__
// The launch's dynamic shared memory: a declaration that means nothing in C++, so it is made here.
template <typename T>
__device__ T* dynamic_shared() {
  extern __shared__ uint4 kvcomp_dynamic_shared[];
  return reinterpret_cast<T*>(kvcomp_dynamic_shared);
}
#endif

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void from_float(float x, float& to) { to = x; }
__device__ inline void from_float(float x, __half& to) { to = __float2half_rn(x); }
__device__ inline void from_float(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }

// Loads that nothing will ask for again.
template <typename T>
__device__ inline void load_streaming(const T* from, T (&to)[1]) {
  to[0] = __ldcs(from);
}
template <typename T>
__device__ inline void load_streaming(const T* from, T (&to)[4]) {
  using Vector = std::conditional_t<sizeof(T) == 2, uint2, uint4>;
  const Vector vector = __ldcs(reinterpret_cast<const Vector*>(from));
  memcpy(to, &vector, sizeof vector);
}

// use(j, logit - lse) for token j at `logits` under each of the heads first, first + step, ... All
// loads of a round of kLoads heads are under way before the first is used.
template <int kLoads, int kVec, typename Logit, typename Use>
__device__ inline void for_each_head(const Logit* logits, int64_t stride_h, const float* lse,
                                     int first, int heads, int step, const Use& use) {
  for (int round = first; round < heads; round += kLoads * step) {
    Logit x[kLoads][kVec] = {};
    float normaliser[kLoads] = {};
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int head = round + i * step;
      if (head >= heads) break;
      load_streaming(logits + head * stride_h, x[i]);
      normaliser[i] = lse[head];
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (round + i * step >= heads) break;
      // Where nothing was attended the lse is -inf, and so are the logits: -inf, not NaN.
      const float subtract = normaliser[i] == -INFINITY ? INFINITY : normaliser[i];
#pragma unroll
      for (int j = 0; j < kVec; ++j) use(j, to_float(x[i][j]) - subtract);
    }
  }
}

// Whether kVec logits can be loaded at once wherever a multiple of kVec tokens begins.
template <int kVec>
bool logits_aligned(ScalarType dtype, const void* logits, int64_t stride_b, int64_t stride_h) {
  const std::size_t bytes = kVec * (dtype == ScalarType::f16 ? sizeof(__half) : sizeof(float));
  return reinterpret_cast<std::uintptr_t>(logits) % bytes == 0 && stride_b % kVec == 0 &&
         stride_h % kVec == 0;
}

// start(Logit{}) with the type that logits of `dtype` have.
template <typename Start>
void with_logit_type(ScalarType dtype, const Start& start) {
  dtype == ScalarType::f16 ? start(__half{}) : start(float{});
}

// start(T{}) with the floating type of `dtype`.
template <typename Start>
void with_float_type(ScalarType dtype, const Start& start) {
  switch (dtype) {
    case ScalarType::f32: return start(float{});
    case ScalarType::f16: return start(__half{});
    case ScalarType::bf16: return start(__nv_bfloat16{});
    case ScalarType::i8: break;  // no floating type: boundaries do not let it through
  }
}

__device__ inline void store_as(ScalarType dtype, float value, void* out, int64_t at) {
  switch (dtype) {
    case ScalarType::f32: return from_float(value, static_cast<float*>(out)[at]);
    case ScalarType::f16: return from_float(value, static_cast<__half*>(out)[at]);
    case ScalarType::bf16: return from_float(value, static_cast<__nv_bfloat16*>(out)[at]);
    case ScalarType::i8: break;
  }
}

// Sum over aligned groups of `width` lanes (a power of two), in all of its lanes.
__device__ inline float group_sum(float value, int width) {
  for (int lanes = width / 2; lanes > 0; lanes /= 2) {
    value += __shfl_xor_sync(kFullMask, value, lanes);
  }
  return value;
}

// Sum over the lanes up to this one.
__device__ inline int sum_through(int value) {
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const int lower = __shfl_up_sync(kFullMask, value, lanes);
    if (static_cast<int>(threadIdx.x % 32) >= lanes) value += lower;
  }
  return value;
}

// How many of 0, 1, ... count - 1 hold a predicate that only the first ones hold. A warp asks for
// 32 of them at a time.
template <typename Predicate>
__device__ inline int count_leading(int count, const Predicate& holds) {
  int first = 0, past = count;  // all below `first` hold it, none from `past` on
  while (first < past) {
    const int step = (past - first + 31) / 32;
    const int probe = first + (threadIdx.x % 32 + 1) * step - 1;
    const int held = __popc(__ballot_sync(kFullMask, probe < past && holds(probe)));
    first += held * step;
    past = min(past, first + step - 1);
  }
  return first;
}

}  // namespace kvcomp
