// The CUDA device code run on the CPU by the emulator, on CPU tensors: for tests.
#pragma once

#include "kvcomp/params.h"

namespace kvcomp::cuda_host {

void page_scores(const PageScoresParams& params);

}  // namespace kvcomp::cuda_host
