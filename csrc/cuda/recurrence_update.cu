#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "kvcomp/recurrence_update.cuh"

namespace kvcomp::cuda {

void recurrence_update(const RecurrenceUpdateParams& params, int device, std::uintptr_t stream) {
  launch_recurrence_update(params, Launch("recurrence_update", device, stream));
}

}  // namespace kvcomp::cuda
