// One bit per token: whether its probability reaches the threshold under any head of a unit. One
// task marks a run of tokens of one unit. Bytes: the logits, read once.
#include "kernels.h"
#include "parallel.h"

namespace kvcomp::cpu {

void attention_hits(const AttentionHitsParams& p) {
  constexpr std::int64_t kGrain = 1 << 17;  // logits that are worth a thread
  constexpr int kWords = 64;                // of a task; the row of a head is 8 KiB
  const simd::Rows& rows = simd::rows();
  const int num_heads = p.num_heads / p.num_units;
  const int tasks_per_unit = (p.num_words + kWords - 1) / kWords;
  const std::int64_t num_tasks = std::int64_t{p.batch} * p.num_units * tasks_per_unit;
  const std::int64_t work = std::int64_t{p.batch} * p.num_heads * p.num_slots;
  const int threads = num_threads(work, kGrain);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (std::int64_t task = 0; task < num_tasks; ++task) {
    const std::int64_t row = task / tasks_per_unit;
    const std::int64_t b = row / p.num_units, unit = row % p.num_units, head = unit * num_heads;
    const int first = static_cast<int>(task % tasks_per_unit) * kWords;
    const int last = std::min(first + kWords, p.num_words);
    std::uint32_t* hits = p.hits + b * p.stride_hits_b + unit * p.num_words;
    const int count = std::clamp(p.seq_lens[b] - first * 32, 0, (last - first) * 32);
    const float* logits = static_cast<const float*>(p.logits) + b * p.stride_logits_b +
                          head * p.stride_logits_h + first * 32;
    rows.hit_bits(logits, p.stride_logits_h, p.lse + b * p.num_heads + head, num_heads, count,
                  p.log_threshold, hits + first);
    std::fill(hits + first + (count + 31) / 32, hits + last, 0);
  }
}

}  // namespace kvcomp::cpu
