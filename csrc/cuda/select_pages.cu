#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "kvcomp/select_pages.cuh"

namespace kvcomp::cuda {

void select_pages(const SelectPagesParams& params, int device, std::uintptr_t stream) {
  launch_select_pages(params, Launch("select_pages", device, stream));
}

}  // namespace kvcomp::cuda
