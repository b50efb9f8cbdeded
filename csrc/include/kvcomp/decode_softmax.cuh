// One step of a softmax that sees its tokens in tiles: the fragment S [16 tokens, 8 columns] of
// one.
#pragma once

#include "kvcomp/device.cuh"

namespace kvcomp {

// s becomes probabilities, relative to the maximum so far; decay what that does to earlier ones.
__device__ inline void advance_softmax(float (&s)[4], float (&decay)[2], float (&max)[2],
                                       float (&sum)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float top = fmaxf(s[i], s[i + 2]);
    for (int lanes = 4; lanes < 32; lanes *= 2) {
      top = fmaxf(top, __shfl_xor_sync(kFullMask, top, lanes));
    }
    top = fmaxf(top, max[i]);
    const float base = top == -INFINITY ? 0.0f : top;
    decay[i] = exp2f((max[i] - base) * kLog2e);
    s[i] = exp2f((s[i] - base) * kLog2e);
    s[i + 2] = exp2f((s[i + 2] - base) * kLog2e);
    sum[i] = sum[i] * decay[i] + s[i] + s[i + 2];
    max[i] = top;
  }
}

}  // namespace kvcomp
