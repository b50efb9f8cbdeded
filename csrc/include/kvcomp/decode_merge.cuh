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

// Lanes that weigh the splits of a query head together: a warp has four such groups, whose loads
// are under way at the same time.
inline constexpr int kWeighing = 8;

// Of the splits of query head `row` of the batch, which is the same in a group of lanes: 4 bytes
// each, read twice. By whole warps.
__device__ inline DecodeMerge weigh_splits(const DecodeAttentionParams& p, int64_t row) {
  const float* lse = p.partial_lse + row * p.num_splits;
  const int rank = threadIdx.x % kWeighing;
  DecodeMerge merge;
  for (int i = rank; i < p.num_splits; i += kWeighing) merge.see(lse[i]);
  for (int lanes = kWeighing / 2; lanes > 0; lanes /= 2) {
    merge.see(__shfl_xor_sync(kFullMask, merge.base, lanes));
  }
  for (int i = rank; i < p.num_splits; i += kWeighing) merge.sum += merge.weight(lse[i]);
  merge.sum = group_sum(merge.sum, kWeighing);
  return merge;
}

// out and lse of query head `row`, by the whole block: 4 * Dv bytes of each split.
__device__ inline void merge_head(const DecodeAttentionParams& p, int64_t row) {
  const DecodeMerge merge = weigh_splits(p, row);
  const float* lse = p.partial_lse + row * p.num_splits;
  const float* partial = p.partial_out + row * p.num_splits * p.value_dim;
  for (int first = 0; first < p.value_dim; first += blockDim.x) {
    const int column = min(first + static_cast<int>(threadIdx.x), p.value_dim - 1);
    float out = 0;
    for (int batch = 0; batch < p.num_splits; batch += 32) {
      const int lane = batch + threadIdx.x % 32, count = min(p.num_splits - batch, 32);
      const float weight = lane < p.num_splits ? merge.weight(lse[lane]) : 0.0f;
#pragma unroll 16
      for (int i = 0; i < count; ++i) {
        const float* of_split = partial + static_cast<int64_t>(batch + i) * p.value_dim;
        out += __shfl_sync(kFullMask, weight, i) * of_split[column];
      }
    }
    const float value = merge.sum == 0 ? 0.0f : out / merge.sum;
    if (first + static_cast<int>(threadIdx.x) < p.value_dim) {
      store_as(p.q_dtype, value, p.out, row * p.value_dim + column);
    }
  }
  if (threadIdx.x == 0) p.lse[row] = merge.lse();
}

}  // namespace kvcomp
