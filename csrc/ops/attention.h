// The boundary that decode_attention and append_attention share: what they ask of q, K, V, lengths,
// pages and outputs.
#pragma once

#include <cstdint>
#include <limits>

#include "backend.h"
#include "kvcomp/params.h"
#include "tensor.h"

namespace kvcomp {

inline constexpr std::int64_t kMaxTokens =
    std::numeric_limits<std::int32_t>::max() - 64;  // a tile beyond fits
inline constexpr int kMostQueries = 64;             // bits of a mask

// Whether q, outputs and logits have a dimension of queries, m, behind that of sequences.
enum class Queries { one, several };

struct AttentionArguments {
  py::handle q, k, v, seq_lens, page_ids, logits, out, lse;
  std::int64_t page_size;
  double scale;
  py::handle partial_out, partial_lse;
  std::int64_t split_size;
  py::handle words;
  double softcap;
  std::int64_t max_len;  // no sequence is longer
  bool checked;          // page_ids, by an earlier call
};

// seq_lens hold what they may, and page_ids do; readable tensors only.
void check_lengths(const Boundary& at, const DecodeAttentionParams& params);
void check_listed_tokens(const Boundary& at, const DecodeAttentionParams& params);

// Checked, values too where they can be read. Without q_lens and tail, which are up to the caller.
AppendAttentionParams attention_params(const Boundary& at, Backend backend, Queries queries,
                                       const AttentionArguments& given);

}  // namespace kvcomp
