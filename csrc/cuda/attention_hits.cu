#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "kvcomp/attention_hits.cuh"

namespace kvcomp::cuda {

void attention_hits(const AttentionHitsParams& params, int device, std::uintptr_t stream) {
  launch_attention_hits(params, Launch("attention_hits", device, stream));
}

}  // namespace kvcomp::cuda
