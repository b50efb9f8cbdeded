// Cached keys turned to other positions in place, one angle per row and pair of elements. One task
// turns a run of tokens of one head. Bytes: the rotated part of the keys, read and written.
#include "kernels.h"
#include "parallel.h"

namespace kvcomp::cpu {

void rotate_keys(const RotateKeysParams& p) {
  constexpr std::int64_t kGrain = 1 << 17;  // elements that are worth a thread
  constexpr int kTokens = 64;               // of a task
  const simd::TypedRows& rows = typed(simd::rows(), p.dtype);
  const std::int64_t size = size_of(p.dtype);
  const int tasks_per_head = (p.num_tokens + kTokens - 1) / kTokens;
  const std::int64_t num_tasks = std::int64_t{p.batch} * p.num_heads * tasks_per_head;
  const std::int64_t work = std::int64_t{p.batch} * p.num_heads * p.num_tokens * 2 * p.half;
  const int threads = num_threads(work, kGrain);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (std::int64_t task = 0; task < num_tasks; ++task) {
    const std::int64_t row = task / tasks_per_head;
    const std::int64_t b = row / p.num_heads, head = row % p.num_heads;
    const std::int64_t first = task % tasks_per_head * kTokens;
    const int count = static_cast<int>(std::min<std::int64_t>(kTokens, p.num_tokens - first));
    char* k = static_cast<char*>(p.k) +
              (b * p.stride_k_b + head * p.stride_k_h + first * p.stride_k_t) * size;
    for (int t = 0; t < count; ++t, k += p.stride_k_t * size) {
      rows.rotate(k, p.half, p.cos + b * p.half, p.sin + b * p.half);
    }
  }
}

}  // namespace kvcomp::cpu
