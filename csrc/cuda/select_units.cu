#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "kvcomp/select_units.cuh"

namespace kvcomp::cuda {

void select_units(const SelectUnitsParams& params, int device, std::uintptr_t stream) {
  launch_select_units(params, Launch("select_units", device, stream));
}

}  // namespace kvcomp::cuda
