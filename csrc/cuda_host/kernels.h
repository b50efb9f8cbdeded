// The CUDA device code run on the CPU by the emulator, on CPU tensors: for tests.
#pragma once

#include "kvcomp/params.h"

namespace kvcomp::cuda_host {

void attention_hits(const AttentionHitsParams& params);
void compact_kv(const CompactKvParams& params);
void page_scores(const PageScoresParams& params);
void recurrence_update(const RecurrenceUpdateParams& params);
void select_victims(const SelectVictimsParams& params);

}  // namespace kvcomp::cuda_host
