#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "kvcomp/decode_attention.cuh"

namespace kvcomp::cuda {

void decode_attention(const DecodeAttentionParams& params, int device, std::uintptr_t stream) {
  if (params.kv_dtype == ScalarType::i8) return decode_codes(params, device, stream);
  const Launch launch("decode_attention", device, stream);
  with_float_type(params.kv_dtype,
                  [&](auto type) { launch_decode_attention(type, params, launch); });
}

int decode_attention_blocks(ScalarType dtype, int head_dim, int value_dim, int device) {
  DecodeAttentionParams params{};
  params.kv_dtype = dtype;
  params.head_dim = head_dim;
  params.value_dim = value_dim;
  params.num_heads = params.num_kv_heads = params.num_splits = 1;
  if (dtype == ScalarType::i8) return decode_codes_blocks(params, device);
  int blocks = 0;
  const Occupancy occupancy("decode_attention", device, blocks);
  with_float_type(dtype, [&](auto type) { launch_decode_attention(type, params, occupancy); });
  return blocks;
}

}  // namespace kvcomp::cuda
