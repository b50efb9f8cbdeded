// The CPU kernels: one function per op, on params that the boundary has checked.
#pragma once

#include "kvcomp/params.h"

namespace kvcomp::cpu {

void append_attention(const AppendAttentionParams& params);
void append_rows(const AppendRowsParams& params);
void attend_and_select(const AttendAndSelectParams& params);
void attention_hits(const AttentionHitsParams& params);
void compact_kv(const CompactKvParams& params);
void decode_attention(const DecodeAttentionParams& params);
void fetch_rows(const FetchRowsParams& params);
void hadamard(const HadamardParams& params);
void kmeans(const KmeansParams& params);
void latent_attention(const DecodeAttentionParams& params);
void linear_rows(const LinearRowsParams& params);
void merge_states(const MergeStatesParams& params);
void norm_rows(const NormRowsParams& params);
void page_scores(const PageScoresParams& params);
void quantize_rows(const QuantizeRowsParams& params);
void query_similarity(const QuerySimilarityParams& params);
void recurrence_update(const RecurrenceUpdateParams& params);
void rotate_keys(const RotateKeysParams& params);
void rotate_rows(const RotateRowsParams& params);
void segment_boundaries(const SegmentBoundariesParams& params);
void select_pages(const SelectPagesParams& params);
void select_units(const SelectUnitsParams& params);
void select_victims(const SelectVictimsParams& params);
void store_segments(const StoreSegmentsParams& params);
void store_slots(const StoreSlotsParams& params);
void unit_scores(const UnitScoresParams& params);

}  // namespace kvcomp::cpu
