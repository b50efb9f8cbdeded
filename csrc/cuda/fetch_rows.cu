#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "kvcomp/fetch_rows.cuh"

namespace kvcomp::cuda {

void fetch_rows(const FetchRowsParams& params, int device, std::uintptr_t stream) {
  launch_fetch_rows(params, Launch("fetch_rows", device, stream));
}

}  // namespace kvcomp::cuda
