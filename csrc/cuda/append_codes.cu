// append_attention over K and V in eight bits.
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "kvcomp/append_attention.cuh"
#include "kvcomp/decode_codes.cuh"

namespace kvcomp::cuda {

void append_codes(const AppendAttentionParams& params, int device, std::uintptr_t stream) {
  const Launch launch("append_attention", device, stream);
  with_codes(params.attention, [&](auto type) { launch_append_attention(type, params, launch); });
}

}  // namespace kvcomp::cuda
