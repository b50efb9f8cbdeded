#include "kvcomp/select_units.cuh"

#include "cuda_host/emulator/cuda_host.h"
#include "cuda_host/kernels.h"

namespace kvcomp::cuda_host {

void select_units(const SelectUnitsParams& params) {
  launch_select_units(params, Launch{"select_units"});
}

}  // namespace kvcomp::cuda_host
