#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "kvcomp/latent_attention.cuh"

namespace kvcomp::cuda {

void latent_attention(const DecodeAttentionParams& params, int device, std::uintptr_t stream) {
  launch_latent_attention(params, Launch("latent_attention", device, stream));
}

}  // namespace kvcomp::cuda
