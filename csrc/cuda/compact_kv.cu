#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "kvcomp/compact_kv.cuh"

namespace kvcomp::cuda {

void compact_kv(const CompactKvParams& params, int device, std::uintptr_t stream) {
  launch_compact_kv(params, Launch("compact_kv", device, stream));
}

}  // namespace kvcomp::cuda
