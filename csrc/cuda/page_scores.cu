#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "kvcomp/page_scores.cuh"

namespace kvcomp::cuda {

void page_scores(const PageScoresParams& params, int device, std::uintptr_t stream) {
  launch_page_scores(params, Launch("page_scores", device, stream));
}

}  // namespace kvcomp::cuda
