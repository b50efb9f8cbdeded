#include "kvcomp/attend_and_select.cuh"

#include "cuda_host/emulator/cuda_host.h"
#include "cuda_host/kernels.h"

namespace kvcomp::cuda_host {

void attend_and_select(const AttendAndSelectParams& params) {
  decode_attention(attention_of(params));
  if (selects_apart(params)) {
    page_scores(params.scoring);
    return select_pages(params.selection);
  }
  launch_merge_and_select(params, Launch{"attend_and_select"});
}

}  // namespace kvcomp::cuda_host
