// The boundaries of decode_attention, page_scores and select_pages without the calls: each checks
// its arguments, values too where they can be read, and describes them. attend_and_select has all
// three.
#pragma once

#include <cstdint>

#include "backend.h"
#include "kvcomp/params.h"
#include "tensor.h"

namespace kvcomp {

DecodeAttentionParams decode_attention_params(
    const Boundary& at, Backend backend, py::handle q, py::handle k, py::handle v,
    py::handle seq_lens, py::handle page_ids, py::handle logits, py::handle out, py::handle lse,
    std::int64_t page_size, double scale, py::handle partial_out, py::handle partial_lse,
    std::int64_t split_size, py::handle words, double softcap, std::int64_t max_len, bool checked);

PageScoresParams page_scores_params(const Boundary& at, Backend backend, const TensorView& logits,
                                    const TensorView& lse, const TensorView& seq_lens,
                                    const TensorView& out, std::int64_t page_size,
                                    std::int64_t num_groups, bool use_max);

SelectPagesParams select_pages_params(const Boundary& at, Backend backend, const TensorView& scores,
                                      const TensorView& seq_lens, const TensorView& page_ids,
                                      const TensorView& selected_lens, std::int64_t page_size,
                                      std::int64_t num_recent, std::int64_t num_sink,
                                      py::handle table, const char* table_name, py::handle pages);

}  // namespace kvcomp
