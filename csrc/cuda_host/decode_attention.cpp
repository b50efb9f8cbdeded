#include "kvcomp/decode_attention.cuh"

#include "cuda_host/emulator/cuda_host.h"
#include "cuda_host/kernels.h"

namespace kvcomp::cuda_host {

void decode_attention(const DecodeAttentionParams& params) {
  launch_decode_attention(params, Launch{"decode_attention"});
}

}  // namespace kvcomp::cuda_host
