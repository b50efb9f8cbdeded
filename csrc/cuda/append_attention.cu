#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "kvcomp/append_attention.cuh"

namespace kvcomp::cuda {

void append_attention(const AppendAttentionParams& params, int device, std::uintptr_t stream) {
  if (params.attention.kv_dtype == ScalarType::i8) return append_codes(params, device, stream);
  const Launch launch("append_attention", device, stream);
  with_float_type(params.attention.kv_dtype,
                  [&](auto type) { launch_append_attention(type, params, launch); });
}

}  // namespace kvcomp::cuda
