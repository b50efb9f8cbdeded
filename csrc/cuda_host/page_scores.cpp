#include "kvcomp/page_scores.cuh"

#include "cuda_host/emulator/cuda_host.h"
#include "cuda_host/kernels.h"

namespace kvcomp::cuda_host {

void page_scores(const PageScoresParams& params) {
  launch_page_scores(params, Launch{"page_scores"});
}

}  // namespace kvcomp::cuda_host
