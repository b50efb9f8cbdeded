#include "kvcomp/select_pages.cuh"

#include "cuda_host/emulator/cuda_host.h"
#include "cuda_host/kernels.h"

namespace kvcomp::cuda_host {

void select_pages(const SelectPagesParams& params) {
  launch_select_pages(params, Launch{"select_pages"});
}

}  // namespace kvcomp::cuda_host
