#include "kvcomp/recurrence_update.cuh"

#include "cuda_host/emulator/cuda_host.h"
#include "cuda_host/kernels.h"

namespace kvcomp::cuda_host {

void recurrence_update(const RecurrenceUpdateParams& params) {
  launch_recurrence_update(params, Launch{"recurrence_update"});
}

}  // namespace kvcomp::cuda_host
