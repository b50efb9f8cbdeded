#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "kvcomp/store_slots.cuh"

namespace kvcomp::cuda {

void store_slots(const StoreSlotsParams& params, int device, std::uintptr_t stream) {
  launch_store_slots(params, Launch("store_slots", device, stream));
}

}  // namespace kvcomp::cuda
