// The CPU kernels: one function per op, on params that the boundary has checked.
#pragma once

#include "kvcomp/params.h"

namespace kvcomp::cpu {

void decode_attention(const DecodeAttentionParams& params);
void merge_states(const MergeStatesParams& params);
void page_scores(const PageScoresParams& params);
void select_pages(const SelectPagesParams& params);

}  // namespace kvcomp::cpu
