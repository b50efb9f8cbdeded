// The best pages of each row, ascending: the value of the last one that fits is found first, then
// one pass takes what lies above it and the oldest of what equals it. Bytes: the scores, read
// twice.
#include "kernels.h"
#include "parallel.h"
#include "threshold.h"

namespace kvcomp::cpu {
namespace {

// One row's pages: forced sinks, the best of the middle, forced recent ones, in page order.
void select_row(const SelectPagesParams& p, const simd::Rows& rows, int batch, int set) {
  const int used =
      static_cast<int>((std::int64_t{p.seq_lens[batch]} + p.page_size - 1) / p.page_size);
  std::int32_t* ids = p.page_ids + (std::int64_t{batch} * p.num_sets + set) * p.num_selected;
  std::int32_t* const end = ids + p.num_selected;
  const auto append = [&ids](int first, int last) {
    for (int page = first; page < last; ++page) *ids++ = page;
  };
  if (used <= p.num_selected) {
    append(0, used);
    std::fill(ids, end, -1);
    return;
  }
  const int first = p.num_sink, count = used - p.num_recent - p.num_sink;
  const int chosen = p.num_selected - p.num_recent - p.num_sink;
  append(0, p.num_sink);
  if (chosen > 0) {
    static thread_local Workspace workspace;
    float* space = workspace.get(count + kSlack);
    const float* x = p.scores + batch * p.stride_scores_b + set * p.stride_scores_h + first;
    const Threshold threshold = find_threshold(rows, x, count, chosen, space);
    auto* found = reinterpret_cast<std::int32_t*>(space);
    rows.select(x, count, threshold.value, threshold.num_equal, first, found);
    ids = std::copy_n(found, chosen, ids);
  }
  append(used - p.num_recent, used);
}

// The entries of the table at the selected columns.
void look_up(const SelectPagesParams& p, int batch, int set) {
  const std::int64_t row = (std::int64_t{batch} * p.num_sets + set) * p.num_selected;
  const std::int32_t* table = p.table + batch * p.stride_table_b + set * p.stride_table_h;
  const std::int32_t* columns = p.page_ids + row;
  for (int i = 0; i < p.num_selected; ++i) {
    p.pages[row + i] = columns[i] < 0 ? -1 : table[columns[i]];
  }
}

}  // namespace

void select_pages(const SelectPagesParams& p) {
  constexpr std::int64_t kGrain = 1 << 15;  // scores that are worth a thread
  const simd::Rows& rows = simd::rows();
  for (int b = 0; b < p.batch; ++b) {
    const std::int64_t length = p.seq_lens[b], used = (length + p.page_size - 1) / p.page_size;
    const std::int64_t dropped = std::max<std::int64_t>(0, used - p.num_selected);
    p.selected_lens[b] = static_cast<std::int32_t>(length - dropped * p.page_size);
  }
  const int num_rows = p.batch * p.num_sets;
  const int threads = std::min(num_rows, num_threads(std::int64_t{num_rows} * p.num_pages, kGrain));
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int row = 0; row < num_rows; ++row) {
    select_row(p, rows, row / p.num_sets, row % p.num_sets);
    if (p.pages) look_up(p, row / p.num_sets, row % p.num_sets);
  }
}

}  // namespace kvcomp::cpu
