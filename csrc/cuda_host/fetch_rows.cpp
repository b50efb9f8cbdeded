#include "kvcomp/fetch_rows.cuh"

#include "cuda_host/emulator/cuda_host.h"
#include "cuda_host/kernels.h"

namespace kvcomp::cuda_host {

void fetch_rows(const FetchRowsParams& params) { launch_fetch_rows(params, Launch{"fetch_rows"}); }

}  // namespace kvcomp::cuda_host
