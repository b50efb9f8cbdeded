// Attention over all tokens, the scores of their pages, and the best of these: one after the other.
#include "kernels.h"

namespace kvcomp::cpu {

void attend_and_select(const AttendAndSelectParams& p) {
  decode_attention(p.attention);
  page_scores(p.scoring);
  select_pages(p.selection);
}

}  // namespace kvcomp::cpu
