// decode_attention over K and V in eight bits.
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "kvcomp/decode_codes.cuh"

namespace kvcomp::cuda {

void decode_codes(const DecodeAttentionParams& params, int device, std::uintptr_t stream) {
  const Launch launch("decode_attention", device, stream);
  with_codes(params, [&](auto type) { launch_decode_attention(type, params, launch); });
}

int decode_codes_blocks(const DecodeAttentionParams& params, int device) {
  int blocks = 0;
  launch_decode_attention(Codes{}, params, Occupancy("decode_attention", device, blocks));
  return blocks;
}

}  // namespace kvcomp::cuda
