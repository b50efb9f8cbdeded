#include "kvcomp/segment_boundaries.cuh"

#include "cuda_host/emulator/cuda_host.h"
#include "cuda_host/kernels.h"

namespace kvcomp::cuda_host {

void segment_boundaries(const SegmentBoundariesParams& params) {
  launch_segment_boundaries(params, Launch{"segment_boundaries"});
}

}  // namespace kvcomp::cuda_host
