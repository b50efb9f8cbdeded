#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "kvcomp/quantize_rows.cuh"

namespace kvcomp::cuda {

void quantize_rows(const QuantizeRowsParams& params, int device, std::uintptr_t stream) {
  launch_quantize_rows(params, Launch("quantize_rows", device, stream));
}

}  // namespace kvcomp::cuda
