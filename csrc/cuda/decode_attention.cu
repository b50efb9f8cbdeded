#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "kvcomp/decode_attention.cuh"

namespace kvcomp::cuda {

void decode_attention(const DecodeAttentionParams& params, int device, std::uintptr_t stream) {
  launch_decode_attention(params, Launch("decode_attention", device, stream));
}

int decode_attention_blocks(ScalarType dtype, int head_dim, int device) {
  DecodeAttentionParams params{};
  params.q_dtype = params.kv_dtype = dtype;
  params.head_dim = head_dim;
  params.num_heads = params.num_kv_heads = params.num_splits = 1;
  int blocks = 0;
  launch_decode_attention(params, Occupancy("decode_attention", device, blocks));
  return blocks;
}

}  // namespace kvcomp::cuda
