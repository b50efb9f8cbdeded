// The best units of each row and head: the score at which their tokens reach the budget is found,
// then one pass takes the units above it and the first of those that equal it. Bytes: scores and
// starts, read about twice, and the rows.
#include <limits>
#include <numeric>

#include "kernels.h"
#include "parallel.h"
#include "threshold.h"

namespace kvcomp::cpu {
namespace {

void select_head(const SelectUnitsParams& p, const simd::Rows& rows, int batch, int head) {
  std::int32_t* out = p.rows + (std::int64_t{batch} * p.num_heads + head) * p.budget;
  std::int32_t* const end = out + p.budget;
  const std::int32_t* starts = p.starts + batch * p.stride_starts_b + head * p.stride_starts_h;
  const int count = p.active[batch] ? p.num_indexed[batch] : 0;
  const auto append = [&out](std::int32_t first, std::int32_t length) {
    std::iota(out, out + length, first);
    out += length;
  };
  const std::int32_t total = count ? starts[count] - starts[0] : 0;
  if (total <= p.budget) {
    append(starts[0], total);
    std::fill(out, end, -1);
    return;
  }

  static thread_local Workspace workspace;
  auto* space = reinterpret_cast<std::int32_t*>(workspace.get(2 * (count + kSlack)));
  const float* scores = p.scores + batch * p.stride_scores_b + head * p.stride_scores_h;
  std::int32_t left;  // of the budget, for the units that equal the threshold
  const float threshold = rows.weighted_threshold(scores, starts, count, p.budget, space, &left);
  constexpr int kAll = std::numeric_limits<int>::max();
  const int found = rows.select(scores, count, threshold, kAll, 0, space);
  for (const std::int32_t* unit = space; unit < space + found; ++unit) {
    std::int32_t length = starts[*unit + 1] - starts[*unit];
    if (!(scores[*unit] > threshold)) {
      length = std::min(length, left);
      left -= length;
    }
    append(starts[*unit], length);
  }
}

}  // namespace

void select_units(const SelectUnitsParams& p) {
  constexpr std::int64_t kGrain = 1 << 14;  // units and tokens that are worth a thread
  const simd::Rows& rows = simd::rows();
  const int num_heads = p.batch * p.num_heads;
  const std::int64_t work = std::int64_t{num_heads} * (p.num_units + p.budget);
  const int threads = std::min(num_heads, num_threads(work, kGrain));
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int head = 0; head < num_heads; ++head) {
    select_head(p, rows, head / p.num_heads, head % p.num_heads);
  }
}

}  // namespace kvcomp::cpu
