#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "kvcomp/store_segments.cuh"

namespace kvcomp::cuda {

void store_segments(const StoreSegmentsParams& params, int device, std::uintptr_t stream) {
  launch_store_segments(params, Launch("store_segments", device, stream));
}

}  // namespace kvcomp::cuda
