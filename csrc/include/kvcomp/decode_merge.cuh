// Softmax states that become one: of a block's warps, and of the splits of a sequence.
#pragma once

#include <cstdint>

#include "kvcomp/device.cuh"
#include "kvcomp/params.h"

namespace kvcomp {

// What states weigh when they become one.
struct DecodeMerge {
  float base = -INFINITY, sum = 0;

  __device__ void see(float max) { base = max == max ? fmaxf(base, max) : max; }
  __device__ float weight(float max) const {
    return max == -INFINITY ? 0.0f : exp2f((max - base) * kLog2e);
  }
  __device__ float lse() const { return sum == 0 ? -INFINITY : base + logf(sum); }
};

// Of the splits of query head `row` of the batch, by a whole warp: 4 bytes each, read twice.
__device__ inline DecodeMerge weigh_splits(const DecodeAttentionParams& p, int64_t row) {
  const float* lse = p.partial_lse + row * p.num_splits;
  const int lane = threadIdx.x % 32;
  DecodeMerge merge;
  for (int i = lane; i < p.num_splits; i += 32) merge.see(lse[i]);
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    merge.see(__shfl_xor_sync(kFullMask, merge.base, lanes));
  }
  for (int i = lane; i < p.num_splits; i += 32) merge.sum += merge.weight(lse[i]);
  merge.sum = group_sum(merge.sum, 32);
  return merge;
}

__device__ inline void store_as(ScalarType dtype, float value, void* out, int64_t at) {
  switch (dtype) {
    case ScalarType::f32: return from_float(value, static_cast<float*>(out)[at]);
    case ScalarType::f16: return from_float(value, static_cast<__half*>(out)[at]);
    case ScalarType::bf16: return from_float(value, static_cast<__nv_bfloat16*>(out)[at]);
  }
}

// out and lse of query head `row`, by the whole block: 4 * D bytes of each split.
__device__ inline void merge_head(const DecodeAttentionParams& p, int64_t row) {
  const DecodeMerge merge = weigh_splits(p, row);
  const float* lse = p.partial_lse + row * p.num_splits;
  const float* partial = p.partial_out + row * p.num_splits * p.head_dim;
  for (int column = threadIdx.x; column < p.head_dim; column += blockDim.x) {
    float out = 0;
    for (int i = 0; i < p.num_splits; ++i) {
      out += merge.weight(lse[i]) * partial[static_cast<int64_t>(i) * p.head_dim + column];
    }
    const float value = merge.sum == 0 ? 0.0f : out / merge.sum;
    store_as(p.dtype, value, p.out, row * p.head_dim + column);
  }
  if (threadIdx.x == 0) p.lse[row] = merge.lse();
}

}  // namespace kvcomp
