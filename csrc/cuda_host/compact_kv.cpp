#include "kvcomp/compact_kv.cuh"

#include "cuda_host/emulator/cuda_host.h"
#include "cuda_host/kernels.h"

namespace kvcomp::cuda_host {

void compact_kv(const CompactKvParams& params) { launch_compact_kv(params, Launch{"compact_kv"}); }

}  // namespace kvcomp::cuda_host
