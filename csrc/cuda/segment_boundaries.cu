#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "kvcomp/segment_boundaries.cuh"

namespace kvcomp::cuda {

void segment_boundaries(const SegmentBoundariesParams& params, int device, std::uintptr_t stream) {
  launch_segment_boundaries(params, Launch("segment_boundaries", device, stream));
}

}  // namespace kvcomp::cuda
