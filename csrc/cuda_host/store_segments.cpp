#include "kvcomp/store_segments.cuh"

#include "cuda_host/emulator/cuda_host.h"
#include "cuda_host/kernels.h"

namespace kvcomp::cuda_host {

void store_segments(const StoreSegmentsParams& params) {
  launch_store_segments(params, Launch{"store_segments"});
}

}  // namespace kvcomp::cuda_host
