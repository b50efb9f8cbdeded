#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "kvcomp/hadamard.cuh"

namespace kvcomp::cuda {

void hadamard(const HadamardParams& params, int device, std::uintptr_t stream) {
  launch_hadamard(params, Launch("hadamard", device, stream));
}

}  // namespace kvcomp::cuda
