// One struct per op: every pointer with its shape, every stride in elements. Plain data, so that
// the same struct feeds the CPU kernels, the CUDA launchers and the emulated device code.
//
// B sequences, Hq query heads, Hkv KV heads, G = Hq / Hkv, T token slots, D head size, P pages.
#pragma once

#include <cstdint>

namespace kvcomp {

enum class ScalarType : int32_t { f32, f16, bf16, i8 };  // i8: codes, see QuantizeRowsParams

struct DecodeAttentionParams {
  ScalarType q_dtype;       // of q and out
  ScalarType kv_dtype;      // of k and v: q_dtype or i8
  const void* q;            // [B, Hq, D]
  const void* k;            // [B, Hkv, T, D]; page u begins at slot u * page_pitch
  const void* v;            // [B, Hkv, T, Dv]
  const uint32_t* words;    // [B, Hkv, T] scales of codes; nullptr: no codes
  const int32_t* seq_lens;  // [B] tokens attended
  const int32_t* page_ids;  // [B, 1 or Hkv, K], -1 skips; nullptr: dense
  void* out;                // [B, Hq, Dv], contiguous
  float* lse;               // [B, Hq], contiguous
  ScalarType logits_dtype;  // f32, or on a GPU f16
  void* logits;             // [B, Hq, N] or nullptr
  float* partial_out;       // [B, Hq, S, Dv], S > 1: of splits, on a GPU
  float* partial_lse;       // [B, Hq, S]
  uint32_t* arrived;        // [B, Hq] or nullptr: set to 0 for a kernel that merges the splits next
  int64_t stride_q_b, stride_q_h;
  int64_t stride_k_b, stride_k_h, stride_k_t;
  int64_t stride_v_b, stride_v_h, stride_v_t;
  int64_t stride_words_b, stride_words_h;
  int64_t stride_ids_b, stride_ids_h;  // stride_ids_h is 0 for a set shared by all heads
  int64_t stride_logits_b, stride_logits_h;
  int32_t batch, num_heads, num_kv_heads, head_dim;
  int32_t value_dim;      // Dv, of v and out
  int32_t num_slots;      // T
  int32_t num_listed;     // K
  int32_t num_positions;  // that a length may have: of all slots or listed pages, or fewer
  int32_t page_size;
  int32_t page_pitch;  // slots from one page to the next; page_size where they lie side by side
  int32_t num_splits, split_size;  // S, and positions of each
  float scale;
  float softcap;  // logits become softcap * tanh(logit / softcap); 0: they stay
};

// K and V of new tokens in eight bits. A row is codes in [-127, 127] times its scale; a word holds
// the fp16 scale of a token's K in its low half, that of V in its high half.
struct QuantizeRowsParams {
  ScalarType dtype;  // of k and v
  const void* k;     // [B, H, T, D]
  const void* v;     // [B, H, T, D]
  int8_t* k_codes;   // [B, H, T, D]
  int8_t* v_codes;   // [B, H, T, D]
  uint32_t* words;   // [B, H, T], last dimension contiguous
  int64_t stride_k_b, stride_k_h, stride_k_t;
  int64_t stride_v_b, stride_v_h, stride_v_t;
  int64_t stride_k_codes_b, stride_k_codes_h, stride_k_codes_t;
  int64_t stride_v_codes_b, stride_v_codes_h, stride_v_codes_t;
  int64_t stride_words_b, stride_words_h;
  int32_t batch, num_heads, num_tokens, head_dim;
  bool turn;  // K by a Hadamard matrix
};

struct HadamardParams {
  ScalarType dtype;  // of x and out
  const void* x;     // [N, D], contiguous
  void* out;         // [N, D], contiguous
  int64_t num_rows;
  int32_t head_dim;  // a power of two
};

// The newest m tokens of each sequence, which are in K and V already.
struct AppendAttentionParams {
  DecodeAttentionParams attention;  // q and out [B, m, Hq, D], lse [B, m, Hq], logits and partial_*
                                    // likewise
  const int32_t* q_lens;            // [B] of the m queries that count; nullptr: all
  const int64_t* tail;              // [B, m] bit j: whether new token j is seen; nullptr: causal
  int64_t stride_q_m, stride_logits_m;
  int64_t stride_tail_b;
  int32_t num_queries;  // m
};

// Rows that come, and the cache that they go to; strides in bytes.
struct AppendedPart {
  const void* from;  // [B, H, m, width]
  void* into;        // [B, H, T, width], last dimension contiguous
  int64_t stride_from_b, stride_from_h, stride_from_t, stride_from_d;
  int64_t stride_into_b, stride_into_h, stride_into_t;
  int32_t width, element;  // elements of a row, and bytes of one
};

// New tokens, behind the tokens of each sequence.
struct AppendRowsParams {
  AppendedPart parts[3];  // K, V, and of codes their words
  int32_t* seq_lens;      // [B], written
  int32_t* logical_lens;  // [B], written, or nullptr
  const int32_t* added;   // [B] of the m tokens; nullptr: all
  int32_t num_parts, batch, num_heads, num_tokens;
};

struct LinearRowsParams {
  static constexpr int kMaxRows = 32;

  ScalarType dtype;         // of x, weight, bias and out
  const void* x[kMaxRows];  // rows [width]
  const void* weight;       // [num_outputs, width], last dimension contiguous
  const void* bias;         // [num_outputs], contiguous, or nullptr
  void* out;                // [num_rows, num_outputs], contiguous
  int64_t stride_weight;
  int64_t num_outputs;
  int32_t num_rows, width;
};

struct NormRowsParams {
  ScalarType dtype;    // of x, weight and out
  const void* x;       // [num_rows, width], contiguous
  const void* weight;  // [width]
  void* out;           // [num_rows, width], contiguous
  int64_t num_rows;
  int32_t width;
  float eps;
};

struct RotatedRows {
  const void* x;  // [B, H, n, D], last dimension contiguous
  void* out;      // likewise
  int64_t stride_x_b, stride_x_h, stride_x_t;
  int64_t stride_out_b, stride_out_h, stride_out_t;
  int32_t num_heads;
};

struct RotateRowsParams {
  ScalarType dtype;       // of all
  RotatedRows rows[2];    // queries and keys
  const void *cos, *sin;  // [B, n, D], last dimension contiguous
  int64_t stride_cos_b, stride_cos_t;
  int64_t stride_sin_b, stride_sin_t;
  int32_t batch, num_tokens, head_dim;
};

struct MergeStatesParams {
  ScalarType dtype;    // of out_a, out_b and out
  const void* out_a;   // [B, Hq, D], contiguous
  const float* lse_a;  // [B, Hq], contiguous
  const void* out_b;   // [B, Hq, D], contiguous
  const float* lse_b;  // [B, Hq], contiguous
  void* out;           // [B, Hq, D], contiguous
  float* lse;          // [B, Hq], contiguous
  int64_t num_rows;    // B * Hq
  int32_t head_dim;
};

struct PageScoresParams {
  ScalarType logits_dtype;  // f32, or on a GPU f16
  const void* logits;       // [B, Hq, N], last dimension contiguous
  const float* lse;         // [B, Hq], contiguous
  const int32_t* seq_lens;  // [B]
  float* scores;            // [B, num_groups, P], contiguous
  int64_t stride_logits_b, stride_logits_h;
  int32_t batch, num_heads, num_groups;
  int32_t num_slots;  // N
  int32_t num_pages;  // P = ceil(N / page_size)
  int32_t page_size;
  bool use_max;  // over the heads of a group; otherwise their sum
};

struct SelectPagesParams {
  const float* scores;      // [B, H, P], last dimension contiguous
  const int32_t* seq_lens;  // [B]
  int32_t* page_ids;        // [B, H, K], contiguous; ascending, then -1
  int32_t* selected_lens;   // [B] tokens in the set
  const int32_t* table;     // [B, 1 or H, N], N >= P, last dimension contiguous; nullptr: no pages
  int32_t* pages;           // [B, H, K], contiguous: entries of the table
  int64_t stride_scores_b, stride_scores_h;
  int64_t stride_table_b, stride_table_h;  // stride_table_h is 0 for a list shared by all sets
  int32_t batch, num_sets;                 // H
  int32_t num_pages;                       // P
  int32_t num_selected;                    // K
  int32_t page_size, num_recent, num_sink;
};

struct AttendAndSelectParams {
  DecodeAttentionParams attention;  // with logits
  PageScoresParams scoring;         // of these logits; one group per set
  SelectPagesParams selection;      // by these scores
};

// K and V of new tokens, into the pages of a pool that sequences share.
struct StoreSlotsParams {
  const void* k;                   // [N, H, D]
  const void* v;                   // [N, H, Dv]
  void* k_pool;                    // [pages, H, P, D]
  void* v_pool;                    // [pages, H, P, Dv]
  const int64_t* slots;            // [N] page * P + place in it; a negative one stores nothing
  int64_t stride_k_n, stride_k_h;  // in bytes, as all strides here
  int64_t stride_v_n, stride_v_h;
  int64_t stride_k_pool_p, stride_k_pool_h, stride_k_pool_t;
  int64_t stride_v_pool_p, stride_v_pool_h, stride_v_pool_t;
  int64_t num_slots;  // pages * P
  int32_t num_tokens, num_heads, page_size;
  int32_t k_bytes, v_bytes;  // of one head's K and V of a token; v_bytes may be 0
};

struct AttentionHitsParams {
  ScalarType logits_dtype;  // f32, or on a GPU f16
  const void* logits;       // [B, Hq, N], last dimension contiguous
  const float* lse;         // [B, Hq], contiguous
  const int32_t* seq_lens;  // [B]
  uint32_t* hits;           // [B, U, W], last two contiguous; bit i % 32 of word i / 32 is token i
  int64_t stride_logits_b, stride_logits_h;
  int64_t stride_hits_b;
  int32_t batch, num_heads, num_units;
  int32_t num_slots;  // N
  int32_t num_words;  // W
  float log_threshold;
};

struct RecurrenceUpdateParams {
  const uint32_t* hits;     // [B, R, U, W], last two contiguous; R <= 32
  int32_t* last_hit;        // [B, U, N], contiguous
  int32_t* longest;         // [B, U, N], contiguous
  const int32_t* seq_lens;  // [B] after the last step
  const int32_t* born;      // [B] last slots that are new since the last replay
  int64_t stride_hits_b, stride_hits_r;
  int32_t batch, num_units;
  int32_t num_steps;  // R
  int32_t num_slots;  // N
  int32_t num_words;  // W
  int32_t first_step;
};

struct SelectVictimsParams {
  const float* scores;       // [B, U, N], last dimension contiguous
  const int32_t* positions;  // [B, U, N], last dimension contiguous
  const int32_t* seq_lens;   // [B]
  const int32_t* kept_lens;  // [B]
  int32_t* victims;          // [B, U, V], contiguous; ascending, then -1
  int64_t stride_scores_b, stride_scores_u;
  int64_t stride_positions_b, stride_positions_u;
  int32_t batch, num_units;
  int32_t num_slots;    // N
  int32_t num_victims;  // V
  int32_t num_recent;
};

struct CompactKvParams {
  static constexpr int kMaxState = 8;

  void* k;                                     // [B, H, T, D]
  void* v;                                     // [B, H, T, Dv]
  void* state[kMaxState];                      // num_state tensors [B, U', T'] of 4-byte elements
  const int32_t* victims;                      // [B, U, V], contiguous; ascending, then -1
  const int32_t* seq_lens;                     // [B] before
  int64_t stride_k_b, stride_k_h, stride_k_t;  // in bytes, as all strides here
  int64_t stride_v_b, stride_v_h, stride_v_t;
  int64_t stride_state_b[kMaxState], stride_state_u[kMaxState];
  int32_t state_units[kMaxState];       // U' of each, U or H
  int32_t batch, num_heads, num_units;  // U is 1 or H
  int32_t num_slots;                    // the least of T and all T'
  int32_t num_victims;                  // V
  int32_t num_state;
  int32_t k_bytes, v_bytes;  // of one head's K and V of a token; v_bytes may be 0
};

struct RotateKeysParams {
  ScalarType dtype;  // of k
  void* k;           // [B, H, T, D]
  const float* cos;  // [B, R / 2], contiguous
  const float* sin;  // [B, R / 2], contiguous
  int64_t stride_k_b, stride_k_h, stride_k_t;
  int32_t batch, num_heads, num_tokens;
  int32_t half;  // R / 2
};

struct KmeansParams {
  ScalarType dtype;      // of keys and centroids
  const void* keys;      // [B, H, N, D]
  const int32_t* first;  // [B]
  const int32_t* last;   // [B]
  int32_t* labels;       // [B, H, N], contiguous
  void* centroids;       // [B, H, K, D], contiguous
  int32_t* sizes;        // [B, H, K], contiguous
  int64_t stride_k_b, stride_k_h, stride_k_t;
  int32_t batch, num_heads, num_tokens, head_dim;
  int32_t num_clusters;  // K
  int32_t cluster_size, window, iterations;
};

struct QuerySimilarityParams {
  ScalarType dtype;   // of q and previous
  const void* q;      // [B, Hq, D]
  void* previous;     // [B, Hq, D], contiguous
  float* similarity;  // [B]
  int64_t stride_q_b, stride_q_h;
  int32_t batch, num_heads, head_dim;
};

struct SegmentBoundariesParams {
  const float* similarity;  // [B]
  const int32_t* lengths;   // [B]
  int32_t* starts;          // [B, H, U + 1], last dimension contiguous
  int32_t* num_units;       // [B]
  int32_t* num_indexed;     // [B]
  int32_t* closed;          // [B]
  int32_t* triggered;       // [B]
  int64_t stride_starts_b, stride_starts_h;
  int32_t batch, num_heads;
  int32_t max_units;  // U
  float cut_below, retrieve_below;
  int32_t shortest, longest, local;
};

// Rows of K and V in host memory: block i holds rows [first_row[i], first_row[i + 1]). A row is K
// and behind it V, [D + Dv]; of codes, both, their word, and zeros up to a multiple of 16 bytes.
struct PoolBlocks {
  static constexpr int kMaxBlocks = 32;

  void* data[kMaxBlocks];             // [B, H, R, D + Dv] or [B, H, R, 2 D + 16] each, contiguous
  int32_t first_row[kMaxBlocks + 1];  // ascending; first_row[num_blocks] is the number of rows
  int32_t num_blocks;
  int32_t row_bytes;  // from one row to the next
};

struct StoreSegmentsParams {
  ScalarType dtype;          // of centroids; also of k, v and pool, unless they are codes
  const void* k;             // [B, H, T, D]
  const void* v;             // [B, H, T, Dv]
  const uint32_t* words;     // [B, H, T'] scales of codes; nullptr: no codes
  const int32_t* slot_rows;  // [B, H, T'], last dimension contiguous
  const int32_t* seq_lens;   // [B]
  const int32_t* starts;     // [B, H, U + 1], last dimension contiguous
  const int32_t* num_units;  // [B]
  const int32_t* closed;     // [B]
  void* centroids;           // [B, H, U, D], last two contiguous
  PoolBlocks pool;
  int64_t stride_k_b, stride_k_h, stride_k_t;
  int64_t stride_v_b, stride_v_h, stride_v_t;
  int64_t stride_words_b, stride_words_h;
  int64_t stride_rows_b, stride_rows_h;
  int64_t stride_starts_b, stride_starts_h;
  int64_t stride_centroids_b, stride_centroids_h;
  int32_t batch, num_heads, head_dim, value_dim;  // value_dim may be 0
  int32_t num_slots;                              // the lesser of T and T'
  int32_t max_units;                              // U
  bool turned;                                    // codes of K are of turned keys
};

struct UnitScoresParams {
  ScalarType dtype;            // of q and centroids
  const void* q;               // [B, Hq, D]
  const void* centroids;       // [B, Hkv, U, D], last two contiguous
  const int32_t* starts;       // [B, Hkv, U + 1], last dimension contiguous
  const int32_t* num_indexed;  // [B]
  const int32_t* active;       // [B]
  float* scores;               // [B, Hkv, U], contiguous
  int64_t stride_q_b, stride_q_h;
  int64_t stride_centroids_b, stride_centroids_h;
  int64_t stride_starts_b, stride_starts_h;
  int32_t batch, num_heads, num_kv_heads, head_dim;
  int32_t num_units;  // U
  float scale;
};

struct SelectUnitsParams {
  const float* scores;         // [B, H, U], last dimension contiguous
  const int32_t* starts;       // [B, H, U + 1], last dimension contiguous
  const int32_t* num_indexed;  // [B]
  const int32_t* active;       // [B]
  int32_t* rows;               // [B, H, K], contiguous; ascending, then -1
  int64_t stride_scores_b, stride_scores_h;
  int64_t stride_starts_b, stride_starts_h;
  int32_t batch, num_heads;
  int32_t num_units;  // U
  int32_t budget;     // K
};

struct FetchRowsParams {
  void* k;                     // [B, H, T, D]
  void* v;                     // [B, H, T, Dv]
  uint32_t* words;             // [B, H, T'] scales of codes; nullptr: no codes
  int32_t* slot_rows;          // [B, H, T'], last dimension contiguous
  int32_t* seq_lens;           // [B]
  const int32_t* rows;         // [B, H, K], contiguous; ascending, then -1
  const int32_t* first_local;  // [B]
  const int32_t* active;       // [B]
  int32_t* fetched;            // [B, H], contiguous
  PoolBlocks pool;
  int64_t stride_k_b, stride_k_h, stride_k_t;  // in bytes, as those of v
  int64_t stride_v_b, stride_v_h, stride_v_t;
  int64_t stride_words_b, stride_words_h;  // in elements
  int64_t stride_rows_b, stride_rows_h;    // of slot_rows, in elements
  int32_t batch, num_heads;
  int32_t num_slots;   // the lesser of T and T'
  int32_t num_wanted;  // K
  int32_t num_sinks;
  int32_t k_bytes, v_bytes;  // of one head's K and V of a token; v_bytes may be 0
};

}  // namespace kvcomp
