// The CUDA kernels' launchers. Work goes to the stream of the given device; nothing waits.
#pragma once

#include <cstdint>

#include "kvcomp/params.h"

namespace kvcomp::cuda {

void page_scores(const PageScoresParams& params, int device, std::uintptr_t stream);

}  // namespace kvcomp::cuda
