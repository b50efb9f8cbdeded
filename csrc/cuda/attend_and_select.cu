#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "kvcomp/attend_and_select.cuh"

namespace kvcomp::cuda {

void attend_and_select(const AttendAndSelectParams& params, int device, std::uintptr_t stream) {
  decode_attention(attention_of(params), device, stream);
  if (selects_apart(params)) {
    page_scores(params.scoring, device, stream);
    return select_pages(params.selection, device, stream);
  }
  launch_merge_and_select(params, Launch("attend_and_select", device, stream));
}

}  // namespace kvcomp::cuda
