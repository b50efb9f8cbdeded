#include "kvcomp/attention_hits.cuh"

#include "cuda_host/emulator/cuda_host.h"
#include "cuda_host/kernels.h"

namespace kvcomp::cuda_host {

void attention_hits(const AttentionHitsParams& params) {
  launch_attention_hits(params, Launch{"attention_hits"});
}

}  // namespace kvcomp::cuda_host
