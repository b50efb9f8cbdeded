#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "kvcomp/decode_attention.cuh"

namespace kvcomp::cuda {

void decode_attention(const DecodeAttentionParams& params, int device, std::uintptr_t stream) {
  launch_decode_attention(params, Launch("decode_attention", device, stream));
}

}  // namespace kvcomp::cuda
