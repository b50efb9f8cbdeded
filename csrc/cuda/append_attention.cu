#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "kvcomp/append_attention.cuh"

namespace kvcomp::cuda {

void append_attention(const AppendAttentionParams& params, int device, std::uintptr_t stream) {
  launch_append_attention(params, Launch("append_attention", device, stream));
}

}  // namespace kvcomp::cuda
