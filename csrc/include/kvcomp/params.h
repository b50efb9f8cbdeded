// One struct per op: every pointer with its shape, every stride in elements. Plain data, so that
// the same struct feeds the CPU kernels, the CUDA launchers and the emulated device code.
//
// B sequences, Hq query heads, Hkv KV heads, G = Hq / Hkv, T token slots, D head size, P pages.
#pragma once

#include <cstdint>

namespace kvcomp {

enum class ScalarType : int32_t { f32, f16, bf16 };

struct DecodeAttentionParams {
  ScalarType dtype;         // of q, k, v and out
  const void* q;            // [B, Hq, D]
  const void* k;            // [B, Hkv, T, D]
  const void* v;            // [B, Hkv, T, D]
  const int32_t* seq_lens;  // [B] tokens attended
  const int32_t* page_ids;  // [B, 1 or Hkv, K], -1 skips; nullptr: dense
  void* out;                // [B, Hq, D], contiguous
  float* lse;               // [B, Hq], contiguous
  float* logits;            // [B, Hq, N] or nullptr
  int64_t stride_q_b, stride_q_h;
  int64_t stride_k_b, stride_k_h, stride_k_t;
  int64_t stride_v_b, stride_v_h, stride_v_t;
  int64_t stride_ids_b, stride_ids_h;  // stride_ids_h is 0 for a set shared by all heads
  int64_t stride_logits_b, stride_logits_h;
  int32_t batch, num_heads, num_kv_heads, head_dim;
  int32_t num_slots;   // T
  int32_t num_listed;  // K
  int32_t page_size;
  float scale;
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
  const float* logits;      // [B, Hq, N], last dimension contiguous
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
  int64_t stride_scores_b, stride_scores_h;
  int32_t batch, num_sets;  // H
  int32_t num_pages;        // P
  int32_t num_selected;     // K
  int32_t page_size, num_recent, num_sink;
};

}  // namespace kvcomp
