// Per page, the sum over its tokens of the probability, reduced over the heads of a group. One task
// scores a run of pages of one group. Bytes: the logits of the group's heads, read once.
#include "kernels.h"
#include "parallel.h"

namespace kvcomp::cpu {
namespace {

// Tokens scored at once: their row of each head is 4 KiB, the sums stay in L1.
constexpr int kTokens = 1024;

// Pages [first, last) of one row and group.
void score_pages(const PageScoresParams& p, const simd::Rows& rows, int batch, int group, int first,
                 int last) {
  const int num_heads = p.num_heads / p.num_groups, head = group * num_heads;
  const float* logits =
      static_cast<const float*>(p.logits) + batch * p.stride_logits_b + head * p.stride_logits_h;
  const float* lse = p.lse + std::int64_t{batch} * p.num_heads + head;
  float* scores = p.scores + (std::int64_t{batch} * p.num_groups + group) * p.num_pages;
  const std::int64_t size = p.page_size;
  const std::int64_t end = std::min<std::int64_t>(last * size, p.seq_lens[batch]);
  std::fill(scores + first, scores + last, 0.0f);
  alignas(64) float tokens[kTokens];
  for (std::int64_t begin = first * size; begin < end; begin += kTokens) {
    const int count = static_cast<int>(std::min<std::int64_t>(kTokens, end - begin));
    rows.token_scores(logits + begin, p.stride_logits_h, lse, num_heads, count, p.use_max, tokens);
    for (std::int64_t at = begin; at < begin + count;) {
      const std::int64_t page = at / size;
      const std::int64_t page_end = std::min((page + 1) * size, begin + count);
      scores[page] += rows.sum(tokens + (at - begin), static_cast<int>(page_end - at));
      at = page_end;
    }
  }
}

}  // namespace

void page_scores(const PageScoresParams& p) {
  constexpr std::int64_t kGrain = 1 << 17;  // logits that are worth a thread
  const simd::Rows& rows = simd::rows();
  const int pages_per_task = std::max(1, kTokens / p.page_size);
  const int tasks_per_row = (p.num_pages + pages_per_task - 1) / pages_per_task;
  const std::int64_t num_tasks = std::int64_t{p.batch} * p.num_groups * tasks_per_row;
  const std::int64_t work = std::int64_t{p.batch} * p.num_heads * p.num_slots;
  const int threads = num_threads(work, kGrain);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (std::int64_t task = 0; task < num_tasks; ++task) {
    const std::int64_t row = task / tasks_per_row;
    const int first = static_cast<int>(task % tasks_per_row) * pages_per_task;
    score_pages(p, rows, static_cast<int>(row / p.num_groups), static_cast<int>(row % p.num_groups),
                first, std::min(first + pages_per_task, p.num_pages));
  }
}

}  // namespace kvcomp::cpu
