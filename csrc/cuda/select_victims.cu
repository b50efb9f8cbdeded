#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "kvcomp/select_victims.cuh"

namespace kvcomp::cuda {

void select_victims(const SelectVictimsParams& params, int device, std::uintptr_t stream) {
  launch_select_victims(params, Launch("select_victims", device, stream));
}

}  // namespace kvcomp::cuda
