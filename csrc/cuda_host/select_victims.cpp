#include "kvcomp/select_victims.cuh"

#include "cuda_host/emulator/cuda_host.h"
#include "cuda_host/kernels.h"

namespace kvcomp::cuda_host {

void select_victims(const SelectVictimsParams& params) {
  launch_select_victims(params, Launch{"select_victims"});
}

}  // namespace kvcomp::cuda_host
