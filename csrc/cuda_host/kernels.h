// The CUDA device code run on the CPU by the emulator, on CPU tensors: for tests.
#pragma once

#include "kvcomp/params.h"

namespace kvcomp::cuda_host {

void attend_and_select(const AttendAndSelectParams& params);
void attention_hits(const AttentionHitsParams& params);
void compact_kv(const CompactKvParams& params);
void decode_attention(const DecodeAttentionParams& params);
void fetch_rows(const FetchRowsParams& params);
void page_scores(const PageScoresParams& params);
void recurrence_update(const RecurrenceUpdateParams& params);
void segment_boundaries(const SegmentBoundariesParams& params);
void select_pages(const SelectPagesParams& params);
void select_units(const SelectUnitsParams& params);
void select_victims(const SelectVictimsParams& params);
void store_segments(const StoreSegmentsParams& params);

}  // namespace kvcomp::cuda_host
