// The CUDA kernels' launchers. Work goes to the stream of the given device; nothing waits.
#pragma once

#include <cstdint>

#include "kvcomp/params.h"

namespace kvcomp::cuda {

// Whether the driver, if there is one, runs what this CUDA has compiled: its major version decides.
bool driver_suffices();

void append_codes(const AppendAttentionParams& params, int device, std::uintptr_t stream);
void append_attention(const AppendAttentionParams& params, int device, std::uintptr_t stream);
void attend_and_select(const AttendAndSelectParams& params, int device, std::uintptr_t stream);
void attention_hits(const AttentionHitsParams& params, int device, std::uintptr_t stream);
void compact_kv(const CompactKvParams& params, int device, std::uintptr_t stream);
void decode_attention(const DecodeAttentionParams& params, int device, std::uintptr_t stream);
// Of an SM at once.
int decode_attention_blocks(ScalarType dtype, int head_dim, int value_dim, int device);
void decode_codes(const DecodeAttentionParams& params, int device, std::uintptr_t stream);
int decode_codes_blocks(const DecodeAttentionParams& params, int device);
void fetch_rows(const FetchRowsParams& params, int device, std::uintptr_t stream);
void hadamard(const HadamardParams& params, int device, std::uintptr_t stream);
void latent_attention(const DecodeAttentionParams& params, int device, std::uintptr_t stream);
void page_scores(const PageScoresParams& params, int device, std::uintptr_t stream);
void quantize_rows(const QuantizeRowsParams& params, int device, std::uintptr_t stream);
void recurrence_update(const RecurrenceUpdateParams& params, int device, std::uintptr_t stream);
void segment_boundaries(const SegmentBoundariesParams& params, int device, std::uintptr_t stream);
void select_pages(const SelectPagesParams& params, int device, std::uintptr_t stream);
void select_units(const SelectUnitsParams& params, int device, std::uintptr_t stream);
void select_victims(const SelectVictimsParams& params, int device, std::uintptr_t stream);
void store_segments(const StoreSegmentsParams& params, int device, std::uintptr_t stream);
void store_slots(const StoreSlotsParams& params, int device, std::uintptr_t stream);

}  // namespace kvcomp::cuda
